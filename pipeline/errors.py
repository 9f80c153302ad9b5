"""The one error a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend; the command prints it as one line and exits with code 2.

    Args:
        what: what is wrong.
        where: the key, file or argument at fault.
        fix: what to do about it.
    """

    def __init__(self, what: str, where: str, fix: str):
        super().__init__(f"{what} ({where}): {fix}")
        self.what, self.where, self.fix = what, where, fix
