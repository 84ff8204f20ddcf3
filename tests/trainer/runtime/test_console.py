"""Progress without a terminal."""

from expo.runtime.console import Display


def test_without_a_terminal_progress_is_plain_lines(capsys):
    with Display().bar("replies", total=100) as bar:
        for _ in range(100):
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("replies 100/100")
