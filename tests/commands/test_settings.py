"""The settings of a training: options, the file of settings, and which of them wins."""

import argparse
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.commands import kinds
from portacnn.commands import settings as of
from portacnn.commands.settings import SETTINGS, Settings
from portacnn.errors import ArgumentError

EXAMPLES = {
    kinds.WHOLE: ("7", 7),
    kinds.NUMBER: ("2.5e-4", 0.00025),
    kinds.NUMBER_OR_WORD: ("xavier", "xavier"),
    kinds.WORDS: ("accuracy, f1", ("accuracy", "f1")),
    kinds.TABLE: ('name="x"', {"name": "x"}),
    kinds.FLAG: (None, True),
    kinds.TRANSFORMS: ("horizontal_flip,shift=1", ("horizontal_flip", "shift=1")),
}
"""A word of the command line for each kind, and the value that it stands for."""
WRONG = {
    kinds.WHOLE: [1.0, "1", True],
    kinds.NUMBER: ["1", False, [1.0]],
    kinds.NUMBER_OR_WORD: [True, [1.0]],
    kinds.WORDS: [1, ["a", 1]],
    kinds.TABLE: ["a", [1]],
    kinds.FLAG: [1, "true"],
    kinds.TRANSFORMS: [1, ["shift", 1]],
    kinds.TEXT: [1, True, ["a"]],
}


def example(name):
    about = SETTINGS[name].metadata
    if about["choices"] is not None:
        return about["choices"][-1], about["choices"][-1]
    return EXAMPLES.get(about["kind"], ('\'tis "text"', '\'tis "text"'))


@pytest.fixture
def parsed():
    parser = argparse.ArgumentParser()
    of.add_options(parser)
    return lambda *words: of.given(parser.parse_args(words))


def test_every_setting_is_an_option_and_a_line_of_the_file(parsed, tmp_path):
    said, content = {}, []
    for name in SETTINGS:
        word, value = example(name)
        words = [of.word(name)] if word is None else [of.word(name), word]
        assert parsed(*words) == {name: value}
        said[name] = value
        content.append(f"{name.replace('_', '-')} = {kinds.toml(value)}")
    assert parsed() == {}
    file = tmp_path / "settings.toml"
    file.write_text("\n".join(content))
    assert of.read(file) == said
    whole = of.merged(Settings(), said)
    assert [getattr(whole, name) for name in SETTINGS] == list(said.values())
    file.write_text(of.written(whole))
    kept = {name: value for name, value in said.items() if SETTINGS[name].metadata["kept"]}
    assert set(said) - set(kept) == {
        "out",
        "checkpoint_dir",
        "quiet",
        "distributed",
    }  # where, not what
    assert of.read(file) == kept


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    TEXTS | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30)
@given(name=TEXTS, value=VALUES)
def test_what_is_written_reads_as_it_was(name, value):
    assert tomllib.loads(f"{kinds.toml_key(name)} = {kinds.toml(value)}") == {name: value}


def test_a_name_that_no_file_can_hold():
    with pytest.raises(ArgumentError, match="not valid UTF-8; rename it"):
        kinds.toml("photos\udcff")


def test_options_win_over_the_file_and_tables_are_merged(parsed):
    filed = {"lr": 0.1, "epochs": 3, "model_option": {"a": 1, "b": 2}, "drop_last": True}
    words = ["--lr", "0.2", "--model-option", "b=3", "--model-option", "c=[1, 2]", "--no-drop-last"]
    whole = of.merged(of.merged(Settings(), filed), parsed(*words))
    assert (whole.lr, whole.epochs, whole.drop_last) == (0.2, 3, False)
    assert whole.model_option == {"a": 1, "b": 3, "c": [1, 2]}


def test_augment_says_whether_or_which(parsed, tmp_path):
    assert parsed("--augment") == {"augment": ("standard",)}
    assert parsed("--augment", "--no-augment") == {"augment": ()}
    file = tmp_path / "settings.toml"
    for content, words in (
        ("true", ("standard",)),
        ("false", ()),
        ('"shift=2, cut_out"', ("shift=2", "cut_out")),
    ):
        file.write_text(f"augment = {content}")
        assert of.read(file) == {"augment": words}
    file.write_text('augment = ["flip"]')
    with pytest.raises(ArgumentError, match=r"settings\.toml: augment: unknown transform 'flip'"):
        of.read(file)


def test_a_value_that_is_no_toml_is_text(parsed):
    said = parsed("--model-option", "option=B", "--model-option", "up = bilinear")
    assert said == {"model_option": {"option": "B", "up": "bilinear"}}
    with pytest.raises(SystemExit):
        parsed("--model-option", "option")


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_types_are_refused(tmp_path, name):
    file = tmp_path / "settings.toml"
    for value in WRONG[SETTINGS[name].metadata["kind"]]:
        file.write_text(f"{name} = {kinds.toml(value)}")
        with pytest.raises(ArgumentError) as caught:
            of.read(file)
        assert f"settings.toml: {name} must be " in str(caught.value)
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"epoch = 3", "unknown setting 'epoch'; did you mean epochs?"),
        (b"colour = 'red'", "unknown setting 'colour'; known are data, image_size"),
        (b"[train]\nepochs = 3", "unknown setting 'train'"),
        (b"batch-size = 3\nbatch_size = 4", "batch_size occurs twice"),
        (b"optimizer = 'adamax'", "optimizer must be one of sgd, momentum"),
        (b"epochs = \nlr = 1", "is not a TOML file of settings: Invalid value (at line 1"),
        (b"epochs = 3\nepochs = 4", "is not a TOML file of settings: Cannot overwrite"),
        (b"\x89PNG\r\n\x1a\n\xff", "it looks like a PNG image"),
        (b"data = '\xff'", "it is not text"),
        (b"#" * (2 << 20), "it has more than"),
    ],
)
def test_files_that_say_nothing_clear(tmp_path, content, words):
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    with pytest.raises(ArgumentError) as caught:
        of.read(file)
    assert words in str(caught.value)
