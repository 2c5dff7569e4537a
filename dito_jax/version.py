"""The version of the installed package; pyproject.toml is its only source."""


def installed() -> str:
    """E.g. "0.2.0"; "unknown" where the package is used without being installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("dito_jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
