"""What ``nox`` runs: the tests on every Python that is here, and the checks of the code.

``.ci/run`` does all of this, and builds and tries the packages as well.
"""

import nox

nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def tests(session: nox.Session) -> None:
    """Run the tests; arguments behind ``--`` go to pytest."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def checks(session: nox.Session) -> None:
    """Check style and types, and build the documentation."""
    session.install(".[dev]")
    session.run("ruff", "check", ".")
    session.run("mypy", "--strict", "chest", "examples")
    session.run("sphinx-build", "-q", "-W", "--keep-going", "docs", f"{session.create_tmp()}/docs")
