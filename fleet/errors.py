"""Define the error of running the fleet.

In a module of its own, so that the command line can import it where the stack is not installed.
"""


class StackError(Exception):
    """The stack cannot do what was asked; the text says why.

    Where a process failed, the text ends with the tail of its log.
    """
