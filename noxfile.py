"""What ``nox`` runs: the tests on every Python on the PATH, and the checks of the code.

``.ci/run`` does all of this, and builds and tries the packages as well.
"""

import nox

nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.11", "3.12", "3.13", "3.14", "3.15"])
def tests(session: nox.Session) -> None:
    """Run the tests; arguments behind ``--`` go to pytest."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install(".[dev]")
    session.run("ruff", "check", ".")
    session.run("mypy", "--strict", "chest", "examples")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, where each warning is an error."""
    session.install(".[dev]")
    output = f"{session.create_tmp()}/docs"
    session.run("sphinx-build", "-q", "-W", "--keep-going", "docs", output)
