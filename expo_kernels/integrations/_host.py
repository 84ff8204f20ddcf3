"""Check that the trainer of an integration is installed in a tested version."""

import importlib.metadata
import re


def check_version(package: str, at_least: tuple[int, int], below: tuple[int, int]) -> None:
    """Refuse untested versions: an integration overrides private methods, which change between releases.

    Args:
        package: name of the distribution, and of the extra of expo-rl that installs it.
        at_least: (major, minor) of the oldest tested version.
        below: (major, minor) of the first untested version.

    Raises:
        ImportError: the package is missing, or its version is outside the range.
    """
    needed = f"{package}>={at_least[0]}.{at_least[1]},<{below[0]}.{below[1]}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{needed} is not installed; install it with: pip install 'expo-rl[{package}]'") from error
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not at_least <= (int(found[1]), int(found[2])) < below:
        raise ImportError(f"{package} is {version}, but this integration was tested with {needed}; install that")
