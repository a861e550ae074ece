"""What the emulator says when a kernel is wrong."""


class KernelError(Exception):
    """Something is wrong with a kernel: the message names the file, line and column."""


class KernelRefused(KernelError):
    """The text is not Metal, or not what MLX makes of it: it would not compile on a Mac."""


class CompilerCrashed(KernelRefused):
    """The compiler failed on the text; whether it is Metal is not known."""


class KernelFault(KernelError):
    """The kernel compiles and does something wrong when it runs."""


class NoToolchain(Exception):
    """This machine has no compiler that the emulator can use."""
