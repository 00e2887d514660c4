"""The test files with a mark, for a run of their own."""

from pathlib import Path


def files_marked(mark):
    """Paths of the files in which a test has ``pytest.mark.<mark>``."""
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    return [str(path) for path in files if f"@pytest.mark.{mark}\n" in path.read_text()]
