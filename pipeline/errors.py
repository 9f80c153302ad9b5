"""The one error a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend; the command prints it as one line and exits with code 2.

    Args:
        what: what is wrong.
        where: the key, file or argument at fault.
        fix: what to do about it.

    Attributes:
        shared: every rank raises this error, so one of them may speak for all.
    """

    shared = False

    def __init__(self, what: str, where: str, fix: str):
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return f"{self.what} ({self.where}): {self.fix}"
