"""Words for a person never stop the work: streams that are missing, closed, full, or cannot write
what is said."""

import io
import os
import subprocess
import sys

import pytest

from portacnn import Trainer, console, scratch
from support.digits import BLOCK, ROOT, write_digits
from support.nets import patches, small_net


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Gone(io.StringIO):
    """A terminal whose other end has hung up, or a full disk."""

    encoding = "utf-8"

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(5, "Input/output error")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def trained(**streams):
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        run = Trainer(small_net(), *patches(50), *patches(20, seed=1), epochs=2, mini_batch_size=20)
        run.train()
    return run


def epoch_lines(run):
    figures = zip(run.epoch_loss_list, run.train_acc_list, run.test_acc_list, strict=True)
    return [
        f"epoch {i}: loss {loss:.4f}, train accuracy {train:.4f}, test accuracy {test:.4f}"
        for i, (loss, train, test) in enumerate(figures, 1)
    ]


def test_a_bar_on_a_terminal():
    pytest.importorskip("tqdm")
    out, err = io.StringIO(), Terminal()
    run = trained(stdout=out, stderr=err)
    assert out.getvalue().splitlines() == epoch_lines(run)
    for words in ("6/6", "epoch 2", "loss="):
        assert words in err.getvalue()
    assert "nan" not in err.getvalue()


def test_no_bar_in_a_log():
    """It would be a line a tenth of a second there."""
    out, err = io.StringIO(), io.StringIO()
    run = trained(stdout=out, stderr=err)
    assert out.getvalue().splitlines() == epoch_lines(run)
    assert err.getvalue() == ""


@pytest.mark.parametrize("out", [None, closed, Gone, Terminal])
@pytest.mark.parametrize("err", [None, closed, Gone, Terminal])
def test_streams_that_are_missing_closed_or_gone(out, err):
    made = [stream and stream() for stream in (out, err)]
    run = trained(stdout=made[0], stderr=made[1])
    assert len(run.train_loss_list) == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", made[0])
        patch.setattr(sys, "stderr", made[1])
        console.say("word")
        console.say("word", error=True)
        console.hang_up()
        x, t = patches(20)
        net = scratch.SimpleConvNet(
            (1, 8, 8), {"filter_num": 2, "filter_size": 3}, 5, 4, device="numpy", seed=0
        )
        scratch.Trainer(net, x, t, x, t, 1, 10).train()


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("cp1252", "r/データ é", "r/\\u30c7\\u30fc\\u30bf é"),
        ("ascii", "é", "\\xe9"),
        ("utf-8", "データ", "データ"),
        ("utf-8", "a\udcff", "a\\udcff"),  # a file's name that is not UTF-8
    ],
)
def test_what_an_encoding_lacks_is_escaped(encoding, text, expected):
    raw = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
        console.say(text)
        assert raw.getvalue().decode(encoding) == f"{expected}\n"


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell's redirections")
@pytest.mark.parametrize(
    ("redirected", "encoding"),
    [
        (">&- 2>&-", "utf-8"),
        (">/dev/full", "utf-8"),
        ("2>&-", "cp1252"),
        ("| true", "utf-8"),
    ],
)
def test_results_are_written_whatever_becomes_of_the_words(tmp_path, digits, redirected, encoding):
    # without matplotlib, which takes a second to come
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    command = (
        f"{sys.executable} {ROOT / 'scripts' / 'train.py'} --data {digits} --epochs 1 --batch-size "
        "20 --seed 0 --device numpy "
        f"--out 'r/データ' {redirected}"
    )
    result = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONIOENCODING": encoding,
            "PYTHONUTF8": "0",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(tmp_path),
            "BLOCKED": "matplotlib",
        },
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr
    assert b"Exception ignored" not in result.stderr
    written = {path.name for path in (tmp_path / "r" / "データ").iterdir()}
    assert written >= {"params.safetensors", "history.json"}
    if encoding == "cp1252":
        assert b"weights  r/\\u30c7\\u30fc\\u30bf/params.safetensors" in result.stdout
