"""The exception for a user's mistake. Commands print it as one line and end with exit code 2."""


class UserError(Exception):
    """A mistake in the user's input: a file, a field or a flag.

    The message is one line. It names the file or field and says what to give instead:

        UserError("configs/medqa.py: optimizer.learning_rate is -1e-6; give a number > 0")
    """
