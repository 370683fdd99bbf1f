"""Acts on the job queue, timed in two databases: what backlog and partitions have in common.

statements  the SQL that makes a queue of any length
database    such a queue in a database of its own
acts        what is timed
comparison  both databases in turns, and their ratio
"""
