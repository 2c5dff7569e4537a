"""The user's mistake, told apart from ours."""


class UserError(ValueError):
    """What was given, what was wanted, what to do, in one line; a command prints it and exits with 2."""
