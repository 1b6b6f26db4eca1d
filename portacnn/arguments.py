"""Checks of the plain numbers and words that ops and constructors take.

Each check returns the value or raises an error that states what was expected. Numbers are returned
as Python's own ``int`` or ``float``. Use the returned value, not the argument: an int 3 compares
equal to 3.0, but powers of an int grow without limit, and those of a float overflow.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, signature
from math import inf, isfinite, nan
from operator import index
from typing import Any, Self, TypeVar

from portacnn.errors import ArgumentError

LARGEST = 2**63 - 1
"""Largest whole number that any argument may be: the largest int64, as counts and sizes become
int64 on a device."""


def plain(value: Any, known: Callable[[Any], Any] = lambda value: None) -> Any:
    """Return a value as JSON values: numbers of any library as Python's, tuples as lists.

    Values that JSON cannot hold are returned as they are.

    Args:
        known: called first, with this value and those within it; returns None for values that it
            does not describe.
    """
    if (described := known(value)) is not None:
        return described
    if isinstance(value, Mapping):
        return {name: plain(inner, known) for name, inner in value.items()}
    value = listed(value)
    if isinstance(value, list | tuple):
        return [plain(inner, known) for inner in value]
    if value is None or isinstance(value, bool | int | str | float):
        return value
    if hasattr(value, "__index__"):
        return int(value)
    return float(value) if hasattr(value, "__float__") else value


def listed(value: Any) -> Any:
    """Return an array as nested lists of Python numbers, and everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0 else value


def told(value: Any) -> str:
    """Return a value's repr for a message, truncated to 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 200 else f"{text[:200]}..."


def as_int(value: Any) -> int | None:
    """Return a whole number of any library as a Python int; None for everything else, including
    booleans."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return index(value)
    except TypeError:  # an array of several, or of floats
        return None


def as_float(value: Any) -> float:
    """Return a real number of any library as a Python float; NaN for everything else.

    Booleans and numbers too large for a float also return NaN.
    """
    if type(value) is float:
        return value
    if (
        isinstance(value, bool)
        or not hasattr(value, "__float__")
        or getattr(value, "shape", ()) != ()
    ):
        return nan
    if any(word in str(getattr(value, "dtype", "")) for word in ("bool", "complex")):
        return nan
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return nan


def whole(name: str, value: Any, least: int, most: int = LARGEST) -> int:
    """Return a whole number of at least ``least``. Raises ArgumentError."""
    number = as_int(value)
    if number is None or number < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {told(value)}")
    if number > most:
        raise ArgumentError(f"{name} must be at most {most}, got {told(value)}")
    return number


def wholes(name: str, values: Any, least: int) -> tuple[int, ...]:
    """Return several whole numbers of at least ``least``. Raises ArgumentError."""
    values = listed(values)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ArgumentError(
            f"{name} must be several whole numbers, such as (1, 2); got {told(values)}"
        )
    return tuple(whole(name, value, least) for value in values)


def pair(name: str, value: Any, least: int, most: int = LARGEST) -> tuple[int, int]:
    """Return (rows, columns) from one whole number or two. Raises ArgumentError."""
    value = listed(value)
    several = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(several) != 2 or any(as_int(number) is None for number in several):
        raise ArgumentError(f"{name} must be a whole number or (rows, columns), got {told(value)}")
    return whole(name, several[0], least, most), whole(name, several[1], least, most)


def flag(name: str, value: Any) -> bool:
    """Return a bool of Python or NumPy. Raises ArgumentError."""
    if not isinstance(value, bool) and not (
        getattr(value, "shape", None) == () and str(value.dtype) == "bool"
    ):
        raise ArgumentError(f"{name} must be True or False, got {told(value)}")
    return bool(value)


def real(
    name: str, value: Any, *, least: float = -inf, above: float = -inf, most: float = inf
) -> float:
    """Return a finite number within these bounds. Raises ArgumentError."""
    number = as_float(value)
    if not isfinite(number) or not (least <= number <= most and above < number):
        if most < inf:
            bounds = f" in {least:g}..{most:g}"
        else:
            bounds = (
                f" of at least {least:g}"
                if least > -inf
                else f" above {above:g}"
                if above > -inf
                else ""
            )
        raise ArgumentError(f"{name} must be a finite number{bounds}, got {told(value)}")
    return number


def one_of(name: str, value: Any, *choices: str) -> Any:
    """Return ``value`` if it is one of the words. Raises ArgumentError."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ArgumentError(f"{name} must be one of {listed}; got {told(value)}")
    return value


def not_negative(name: str, value: Any) -> float:
    """Return a finite number of 0 or more. Raises ArgumentError."""
    number = as_float(value)
    if not 0.0 <= number < inf:
        raise ArgumentError(f"{name} must be a number of 0 or more, got {told(value)}")
    return number


def positive(name: str, value: Any) -> float:
    """Return a finite number above 0. Raises ArgumentError."""
    number = as_float(value)
    if not 0.0 < number < inf:
        raise ArgumentError(f"{name} must be a number above 0, got {told(value)}")
    return number


def fraction(name: str, value: Any) -> float:
    """Return a number with 0 <= number < 1. Raises ArgumentError."""
    number = as_float(value)
    if not 0.0 <= number < 1.0:
        raise ArgumentError(f"{name} must lie in 0 <= {name} < 1, got {told(value)}")
    return number


def inner_fraction(name: str, value: Any) -> float:
    """Return a number with 0 < number < 1. Raises ArgumentError."""
    number = as_float(value)
    if not 0.0 < number < 1.0:
        raise ArgumentError(f"{name} must be above 0 and below 1, got {told(value)}")
    return number


def share(name: str, value: Any) -> float:
    """Return a number with 0 <= number <= 1. Raises ArgumentError."""
    number = as_float(value)
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(f"{name} must lie in 0 <= {name} <= 1, got {told(value)}")
    return number


def either(default: Any, **given: Any) -> Any:
    """Return the value of an argument that has several names, or ``default`` if none was given.

    Args:
        given: the value under each name, None if it was not given. The preferred name comes first.

    Raises:
        ArgumentError: if it was given under more than one name.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise ArgumentError(
            f"{' and '.join(named)} are names of one argument, got both; pass only "
            f"{next(iter(given))}"
        )
    return next(iter(named.values()), default)


# --- keywords of other libraries ------------------------------------------------------------------

_TEST_SET = (
    "validation_data validation_set val_data valid_data test_data eval_data eval_set val_dataset "
    "eval_dataset test_dataset val_loader test_loader"
)
_SAME = (
    "lr learning_rate learning_rate_init eta",
    "batch_size mini_batch_size minibatch_size batchsize batch bs",
    "epochs n_epochs num_epochs max_epochs nb_epoch nb_epochs nepochs epoch max_iter",
    "num_classes n_classes nb_classes classes output_size num_outputs out_features units",
    "weight_init weight_init_std kernel_initializer weight_initializer init init_std",
    "bias_init bias_initializer",
    "out_features units out_channels output_size num_units",
    "out_channels filters num_filters filter_num out_features num_output output_channels",
    "in_features in_channels num_features input_dim input_size input_shape",
    "in_channels in_features input_channels channels num_channels n_channels",
    "num_features num_channels normalized_shape in_channels channels",
    "input_size input_shape image_size img_size input_dim",
    "kernel_size filter_size pool_size ksize kernel size kernel_shape window",
    "stride strides",
    "padding pad pads",
    "dilation dilation_rate dilations",
    "groups group num_groups",
    "bias use_bias",
    "p rate dropout drop_prob dropout_ratio dropout_rate keep_prob",
    "dropout p rate dropout_ratio dropout_rate",
    "negative_slope alpha",
    "eps epsilon",
    "beta1 betas beta_1",
    "beta2 betas beta_2",
    "alpha rho smoothing",
    "weight_decay decay l2 weight_decay_rate weight_decay_lambda",
    "nesterov use_nesterov",
    "affine center scale",
    "dim axis",
    "axis dim",
    "axes axis dim dims",
    "dims axes",
    "keepdims keepdim",
    "seed random_state random_seed rng",
    "verbose progress verbosity progress_bar",
    "schedule lr_scheduler scheduler lr_schedule",
    "optimizer optimiser optim opt solver",
    "loss criterion loss_fn loss_func loss_function objective",
    "metrics metric eval_metric eval_metrics scoring",
    "callbacks callback",
    "class_weight class_weights weights",
    "sample_weight sample_weights weights",
    "weight weights class_weight class_weights",
    "clip_norm max_norm grad_clip clipnorm gradient_clip_val max_grad_norm grad_clip_norm",
    "accumulate accumulation_steps gradient_accumulation_steps grad_accum_steps "
    "accumulate_grad_batches",
    "augment augmentation augmentations data_augmentation transform transforms",
    "early_stopping patience early_stop earlystopping",
    "compile_step compile jit_compile",
    "checkpoint_dir checkpoint_path save_dir default_root_dir",
    "keep max_to_keep save_top_k",
    "x_train X_train train_x train_images x X images dataset data train_data train_dataset",
    "t_train y_train Y_train train_y train_labels y Y t labels targets target",
    f"x_test X_test x_val X_val x_valid test_x val_x {_TEST_SET}",
    f"t_test y_test Y_test y_val t_val y_valid test_y val_y {_TEST_SET}",
    "validation_split val_split valid_split test_split test_size val_size validation_fraction",
    "step_size steps",
    "T_max total_steps t_max",
    "eta_min min_lr",
    "total_iters total_steps warmup_steps steps",
    "lowest start_lr min_lr lr_min",
    "highest end_lr max_lr lr_max",
    "steps num_iter num_steps iterations",
    "gamma factor decay_rate",
    "patience n_iter_no_change",
    "monitor metric",
    "better mode",
    "min_delta tol threshold",
    "folder log_dir logdir save_dir",
    "k top_k topk",
    "temperature tau",
    "delta beta",
    "triplets mining miner type_of_triplets triplets_per_anchor",
    "restore_best restore_best_weights",
    "device backend map_location",
    "path f filename file filepath",
    "opset opset_version",
    "root data_dir data_home folder",
    "one_hot_label one_hot onehot",
)
"""Words with the same meaning, one group per line, of portacnn, the book, PyTorch, Keras,
scikit-learn and ONNX.

A word in several groups has several meanings; the function that is called decides which apply.
"""

_BOTH = frozenset(f"betas {_TEST_SET}".split())
"""Words that stand for several arguments together."""

_ADVICE = {
    "activation": "add a layer for it, such as ReLU()",
    "inplace": "layers write no input; leave it out",
    "data_format": "shapes are always (N, C, H, W); leave it out",
    "shuffle": "training images are shuffled in every epoch, by seed; leave it out",
    "validation_split": "split the data yourself and pass x_test and t_test",
    "amsgrad": "it is not supported; leave it out",
    "reduction": "losses are means over the batch; leave it out",
    "from_logits": "losses take a network's outputs before softmax or sigmoid; leave it out",
    "dtype": "set it when the network is built: build(..., dtype=...)",
    "device": "set it when the network is made or built; everything else follows it",
}
"""What to do instead, for keywords that have no other name in portacnn."""

Function = TypeVar("Function", bound=Callable[..., Any])


def keyword_problem(
    called: Callable[..., Any], given: Iterable[str], what: str, advice: Mapping[str, str] = {}
) -> str | None:
    """Return a message about keywords that ``called`` does not take; None if it takes them all.

        >>> keyword_problem(lambda lr: lr, ["learning_rate"], "f")
        'f does not take learning_rate (called lr here); it takes lr'

    Args:
        called: a function, or a class.
        given: the keywords.
        what: the name of ``called`` in the message.
        advice: by keyword, what to do instead. It is used before portacnn's common advice.
    """
    function: Any = called
    if isinstance(called, type):
        function = called.__init__  # type: ignore[misc]
    # a class without a constructor of its own takes nothing
    parameters = {} if function is object.__init__ else signature(function).parameters
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    known = [
        name
        for name, parameter in parameters.items()
        if name not in ("self", "cls") and parameter.kind is not Parameter.VAR_POSITIONAL
    ]
    unknown = [name for name in given if name not in known]
    if not unknown:
        return None
    hints = ", ".join(f"{name}{_hint(name, known, advice)}" for name in unknown)
    return f"{what} does not take {hints}; it takes {', '.join(known) or 'no arguments'}"


def _hint(name: str, known: list[str], advice: Mapping[str, str]) -> str:
    """Return what to use instead of a keyword, in parentheses; empty if that is not known."""
    from difflib import get_close_matches

    if name in advice:
        return f" ({advice[name]})"
    same = [line.split() for line in _SAME]
    names = [word for words in same if name in words for word in words if word in known]
    if names:
        joined = " and " if name in _BOTH else " or "
        return f" (called {joined.join(dict.fromkeys(names))} here)"
    if name in _ADVICE:
        return f" ({_ADVICE[name]})"
    return "".join(f" (did you mean {match}?)" for match in get_close_matches(name, known, 1))


class AnswersKeywords:
    """Base of classes whose TypeError for an unknown keyword names the right one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if kwargs and (problem := keyword_problem(cls, kwargs, cls.__name__)):
            raise TypeError(problem)
        return super().__new__(cls)


def answering_keywords(what: str, advice: Mapping[str, str] = {}) -> Callable[[Function], Function]:
    """Decorate a function so that its TypeError for an unknown keyword names the right one.

    Args:
        what: the function's name in the message.
        advice: by keyword, what to do instead.
    """

    def decorated(function: Function) -> Function:
        known = frozenset(signature(function).parameters)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not known.issuperset(kwargs) and (
                problem := keyword_problem(function, kwargs, what, advice)
            ):
                raise TypeError(problem)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorated
