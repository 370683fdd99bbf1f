"""What can go wrong in running the house, in a module of its own: the command line knows it where nothing of the stack is installed."""


class StackError(Exception):
    """The stack cannot do what was asked; the text says why and, where a process failed, ends with the tail of its log."""
