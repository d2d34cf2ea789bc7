"""What a user's mistake becomes: one line that names the place and the mend, and exit code 2."""


class UserError(Exception):
    """A mistake in what the user gave us: a file, a field, a flag.

    The message is one line. It names the file and the field, and says how to mend it:

        UserError("configs/medqa.py: optimizer.learning_rate is -1e-6; give a number > 0")
    """
