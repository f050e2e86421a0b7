"""Errors that the user can mend: a stage prints them in one line. Whatever else is raised is a fault of ours and keeps its traceback."""


class UserError(ValueError):
    """Input, a setting or a file that cannot be used; the message says what, where, what was expected and what to do."""


class NotFiniteError(UserError, FloatingPointError):
    """A number that overflowed under the user's settings; the message says which setting to change."""
