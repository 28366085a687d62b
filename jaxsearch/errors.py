"""The one exception meant for the person at the keyboard.

Launchers and the server turn `InputError` into a single line (or an HTTP 4xx) that says what is wrong and
what to do; any other exception is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """What the user gave cannot be used. The message says what, where, and how to mend it."""
