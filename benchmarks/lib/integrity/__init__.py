"""Is any job lost, doubled or otherwise harmed while a stack is broken on purpose?

probe      the running stack, and every way to look into it that does not ask Darkroom
workload   what is asked for, by seed
submitter  asks over REST, and does not lose count when nobody answers
records    what became of the jobs, read from the rows
underload  jobs keep coming while a thread does things to the stack; rollout: it ends workers
checks     what must hold in the end
figures    what it cost: attempts, steps, images rendered twice
report     how violations are told
command    command line, stack and verdict of a benchmark

Judging happens on rows and objects alone, when all has ended: no process is asked for its opinion.
"""
