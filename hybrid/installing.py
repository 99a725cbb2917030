"""How a package gets into the environment that runs this."""

from importlib.util import find_spec


def command(arguments: str) -> str:
    """What installs the packages that `arguments`, with options, are. Environments of uv have no pip of their own."""
    return f"{'pip' if find_spec('pip') else 'uv pip'} install {arguments}"
