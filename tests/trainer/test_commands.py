"""`expo-rl` and `python -m expo`: every command's help, errors and ends under the name by which it was called."""

import importlib
import re
import subprocess
import sys

import pytest

import expo.__main__ as dispatcher
from expo.__main__ import COMMANDS, main
from tests import ROOT
from tests.ranks.running import environment

ALSO_CALLED = {name: f"python -m {module.removesuffix('.__main__')}" for name, (module, _) in COMMANDS.items()}
BAD = {
    "train": (["--lrr=1"], "did you mean --optimizer.lr?"),
    "evaluate": (["ledger", "--sets", "s", "--rollout.max_new_tokens=-1"], "--rollout.max_new_tokens = -1: "),
    "data": (["check", "ledger:train", "--columns=3"], "--columns = 3: "),
    "report": (["nowhere"], "nowhere"),
    "export": (["nowhere"], "nowhere is no folder, so it is no run"),
    "serve": (["--kl.beta=-1"], "--kl.beta = -1: "),
    "ablation": (["--out=a", "--kl.beta=-1"], "--kl.beta = -1: "),
    "doctor": (["--gpu"], "unknown argument --gpu; --help lists what it takes"),
}
MEANT = [
    ("train", ["--lr=1"], "--optimizer.lr"),
    ("evaluate", ["ledger", "--num-sample=3"], "--num-samples"),
    ("data", ["show", "ledger:train", "--model=ledger", "--promt=plain"], "--prompt"),
    ("data", ["check", "ledger:train", "--againts=x"], "--against"),
    ("export", ["run", "--adaptor"], "--adapter"),
    ("serve", ["--hots=h"], "--host"),
    ("serve", ["--learning_rate=1"], "--optimizer.lr"),
    ("ablation", ["--out=a", "--seed=1"], "--run.seed"),
    ("ablation", ["--out=a", "--lr=1"], "--optimizer.lr"),
]


def ending(capsys, call, *arguments):
    """The exit code of a command, its stdout and its stderr."""
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(call(*arguments))
    return (stop.value.code, *capsys.readouterr())


def error_of(capsys, call, *arguments):
    code, out, err = ending(capsys, call, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


@pytest.mark.parametrize("prog", ["expo-rl", "python -m expo"])
def test_help_lists_every_command(capsys, prog):
    code, out, _ = ending(capsys, main, ["--help"], prog)
    assert code == 0
    assert re.findall(r"^  (\w+)  ", out, flags=re.MULTILINE) == list(COMMANDS)
    assert out.startswith(f"usage: {prog} COMMAND")
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_the_program_and_fits_a_screen(capsys, name):
    code, out, err = ending(capsys, main, [name, "--help"])
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: expo-rl {name} ")
    assert len(out.splitlines()) <= 45
    assert "python -m expo." not in out.splitlines()[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_is_one_line_that_names_the_program_as_it_was_called(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    argv, expected = BAD[name]
    for call, arguments, prog in [
        (main, ([name, *argv],), f"expo-rl {name}"),
        (main, ([name, *argv], "python -m expo"), f"python -m expo {name}"),
        (importlib.import_module(COMMANDS[name][0]).main, (argv,), ALSO_CALLED[name]),
    ]:
        text = error_of(capsys, call, *arguments)
        assert text.startswith(f"{prog}: error: ")
        assert expected in text


@pytest.mark.parametrize(("name", "argv", "meant"), MEANT)
def test_an_unknown_flag_leads_to_the_one_that_was_meant(capsys, tmp_path, monkeypatch, name, argv, meant):
    monkeypatch.chdir(tmp_path)
    assert f"did you mean {meant}?" in error_of(capsys, main, [name, *argv])


def test_a_flag_of_the_ablation_needs_its_equals_sign(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = error_of(capsys, main, ["ablation", "--out=a", "--run.steps", "3"])
    assert text.endswith("--run.steps has no value; give it as --run.steps=VALUE\n")


def test_a_server_takes_no_options_of_a_training_run(capsys):
    assert "unknown argument --resume" in error_of(capsys, main, ["serve", "--resume"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "no command; expected one of train, evaluate, data, report, export, serve, ablation, doctor"),
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["eval"], "did you mean evaluate?"),
        (["Doctor"], "did you mean doctor?"),
        (["frobnicate"], "unknown command 'frobnicate'; --help lists the commands"),
        (["config.yaml", "--run.seed=1"], "a command comes first, such as expo-rl train config.yaml"),
        (["--dry-run"], "a command comes first, such as expo-rl train --dry-run"),
        (["a\nb"], "unknown command 'a\\nb'"),
    ],
)
def test_an_unknown_command_is_one_line(capsys, argv, expected):
    text = error_of(capsys, main, argv)
    assert text.startswith("expo-rl: error: ")
    assert expected in text


def test_a_command_gets_its_arguments_and_its_exit_code_is_returned(monkeypatch):
    class Module:
        @staticmethod
        def main(argv, prog):
            assert (argv, prog) == (["a", "--b"], "expo-rl report")
            return 3

    monkeypatch.setattr(dispatcher.importlib, "import_module", lambda name: {"expo.report": Module}[name])
    assert main(["report", "a", "--b"]) == 3


def test_ctrl_c_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dispatcher.importlib, "import_module", interrupted)
    assert ending(capsys, main, ["train"]) == (130, "", "expo-rl train: ended by Ctrl-C\n")


def run(script, tmp_path):
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_imports_nothing_that_is_slow_or_may_be_missing(tmp_path):
    script = (
        "import sys; from expo.__main__ import main; main(['--help']); "
        "loaded = {name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'expo', '__main__'}; "
        "assert not {name for name in loaded if not name.startswith('_')}, loaded"
    )
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: expo-rl")


def test_a_missing_package_is_one_line_with_the_way_to_install_it(tmp_path):
    script = "import sys; sys.modules['torch'] = None; from expo.__main__ import main; main(['train'])"
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("expo-rl train: error: the package torch is not installed; ")
    assert 'pip install "expo-rl[train]"' in done.stderr


def test_an_import_error_of_our_own_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(dispatcher.COMMANDS, "report", ("expo.no_such_module", ""))
    with pytest.raises(ModuleNotFoundError, match=r"expo\.no_such_module"):
        main(["report"])


def test_the_page_of_commands_has_an_example_of_each():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| .* \| `expo-rl \1", page, flags=re.MULTILINE) == list(COMMANDS)
    assert "expo-rl" in (ROOT / "README.md").read_text(encoding="utf-8")
