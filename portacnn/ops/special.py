"""Functions that the array API standard lacks."""

from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of

# Coefficients of W. J. Cody, "Rational Chebyshev approximations for the error function", Math.
# Comp. 23 (1969), 631-637, in the order of Horner's rule. |x| <= 0.46875: erf(x) = x * P(x*x) /
# Q(x*x).
_P = (
    0.185777706184603153,
    3.16112374387056560,
    113.864154151050156,
    377.485237685302021,
    3209.37758913846947,
)
_Q = (1.0, 23.6012909523441209, 244.024637934444173, 1282.61652607737228, 2844.23683343917062)
# Above: 1 - erf(x) = exp(-x*x) * R(x) / S(x). The paper uses it up to 4. Beyond 4, 1 - erf(x) <
# 2e-8, so a smaller relative accuracy is enough.
_R = (
    2.15311535474403846e-8,
    0.564188496988670089,
    8.88314979438837594,
    66.1191906371416295,
    298.635138197400131,
    881.952221241769090,
    1712.04761263407058,
    2051.07837782607147,
    1230.33935479799725,
)
_S = (
    1.0,
    15.7449261107098347,
    117.693950891312499,
    537.181101862009858,
    1621.38957456669019,
    3290.79923573345963,
    4362.61909014324716,
    3439.36767414372164,
    1230.33935480374942,
)
_SMALL, _ONE = 0.46875, 6.0  # erf(6) is 1 in float64


def _check(x: Array) -> None:
    check_arrays("erf", x=x)


@op(_check)
def erf(x: Array) -> Array:
    """Return the error function of each element, accurate to a few units in the last place.

    x: any shape, floating point; otherwise raises ArrayError. The formula is W. J. Cody's (1969).
    There is no backward function: the derivative is 2/sqrt(pi) * exp(-x*x).

    >>> np.round(ops.erf(np.array([0.0, 1.0])), 4)
    array([0.    , 0.8427])
    """
    xp = backend_of(x).xp
    size = xp.abs(x)
    near = xp.minimum(size, _SMALL)
    near = near * (_horner(near * near, _P) / _horner(near * near, _Q))
    far = xp.clip(size, _SMALL, _ONE)
    far = 1.0 - xp.exp(-far * far) * (_horner(far, _R) / _horner(far, _S))
    return xp.sign(x) * xp.where(size > _SMALL, far, near)


def _horner(x: Array, coefficients: tuple[float, ...]) -> Array:
    """Return the value of a polynomial. The coefficient of the highest power comes first."""
    first, second, *rest = coefficients
    total = first * x + second
    for coefficient in rest:
        total *= x
        total += coefficient
    return total


def logistic(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), which ``sigmoid`` and the ops built on it compute."""
    xp = backend_of(x).xp
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1.0, e) / (1.0 + e)
