"""The distribution that negatives are drawn from, and how often each word is among them."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Literal, Self, TypeAlias

import torch
from torch import Tensor, nn

from lm_softmax.heads.base import is_size
from lm_softmax.heads.cutoffs import zipf_counts

NoiseKind: TypeAlias = Literal["log_uniform", "unigram", "uniform"]
TOTAL = 2**62  # of all masses: integers of this size are exact, on every device, in every dtype
STRATUM = 2**32  # of expected draws, in fixed point


class Noise(nn.Module):
    """Draws word ids, and gives the expected number of draws of each word.

    A draw inverts the running sum of the masses by binary search: its cost does not depend on the
    number of words but for a logarithm, and it never looks at the drawn values on the host. Masses
    are integers that sum to `2**62`, so no `.to(dtype)` moves the distribution away from the
    expected counts, and every word has at least `2**-62`. Draws come from torch's global generator
    of the device that the buffers are on. The state_dict is empty: what negatives are drawn from is
    an option of training.

    With replacement, word `w` of probability `q(w)` is expected `num_samples * q(w)` times.

    Unique draws are a stratified sample with one draw from each stratum (Cochran 1977, "Sampling
    Techniques", chapter 5): of the words ranked by mass, strata are `num_samples` ranges whose
    masses are about equal, but that a word which would fill a stratum alone is one. One word of
    each is drawn in proportion to its mass, independently of the others. So there are exactly
    `num_samples` distinct words, and the probability that `w` is among them is exactly
    `q(w) / q(stratum of w)`, by whose inverse a drawn word is to be weighted (Horvitz and
    Thompson 1952). Redrawing until the words differ, as is common, has no such closed form.

    Args:
        vocab_size: Number of words.
        num_samples: Number of draws.
        counts: Training-set frequencies, for "unigram"; a count of 0 counts as 1, and None assumes
            Zipf's law with exponent 1.
        noise: "unigram" is in proportion to `counts`, "log_uniform" to
            `log((id + 2) / (id + 1))`, which needs the words to be ranked only, "uniform" to 1; or
            a tensor or list of `vocab_size` masses, each above 0, which need not sum to 1.
        power: The masses are raised to it: at 0.75 rare words are drawn more often than they occur
            (Mikolov et al. 2013, section 2.2).
        unique: Whether all draws differ.

    Raises:
        ValueError: If an option is out of range, a given mass is not above 0, or more unique draws
            are asked for than there are words.
    """

    cumulative: Tensor  # (V + 1,), from 0 to TOTAL, over places: words by mass if unique, or by id
    borders: Tensor | None  # (num_samples + 1,): places at which strata begin
    order: Tensor | None  # (V,): the word at each place, unless that is the id itself
    places: Tensor | None  # (V,): the inverse

    def __init__(
        self,
        vocab_size: int,
        num_samples: int,
        counts: Tensor | None = None,
        *,
        noise: NoiseKind | Tensor | Sequence[float] = "unigram",
        power: float = 1.0,
        unique: bool = True,
    ) -> None:
        super().__init__()
        if not is_size(num_samples):
            raise ValueError(
                f"num_samples must be a whole number of at least 1, got {num_samples!r}"
            )
        if unique and num_samples > vocab_size:
            raise ValueError(
                f"cannot draw num_samples={num_samples} unique words of {vocab_size}: ask for fewer"
                f" or set unique=False"
            )
        if not (is_real(power) and 0 <= power < math.inf):
            raise ValueError(f"noise_power must be at least 0 and finite, got {power!r}")
        self.num_samples = num_samples
        masses = _masses(noise, vocab_size, counts)
        self.given = None if isinstance(noise, str) else masses
        cumulative = _cumulative((masses / masses.amax()) ** power)
        order, borders = None, None
        if unique:
            sizes = cumulative.diff()
            if (sizes[1:] > sizes[:-1]).any():
                sizes, order = sizes.sort(descending=True, stable=True)
                cumulative = torch.cat([cumulative[:1], sizes.cumsum(0)])
            borders = _strata(sizes, num_samples)
        places = None if order is None else order.argsort()
        made = {"cumulative": cumulative, "borders": borders, "order": order, "places": places}
        self._spare: dict[str, Tensor] = {}  # the buffers' values while they are on no device
        for name, buffer in made.items():
            self.register_buffer(name, buffer, persistent=False)
        self.to(torch.get_default_device())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers with their values, which `to_empty` would lose."""
        before = {**dict(self.named_buffers()), **self._spare}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._spare = {}
        for name, buffer in self.named_buffers():
            if buffer.is_meta:
                self._spare[name] = before[name].to("cpu")
            elif buffer is not before[name]:
                buffer.copy_(before[name])
        return self

    @property
    def unique(self) -> bool:
        """Whether all draws differ."""
        return self.borders is not None

    def draw(self) -> Tensor:
        """Ids `(num_samples,)`, one of each stratum in turn if they are unique."""
        point = torch.randint(TOTAL, (self.num_samples,), device=self.cumulative.device)
        if self.borders is not None:
            starts = self.cumulative[self.borders]
            point = starts[:-1] + _share_of(starts.diff(), point)
        drawn = torch.searchsorted(self.cumulative[1:], point, right=True)
        return drawn if self.order is None else self.order[drawn]

    def stratum(self, ids: Tensor) -> Tensor:
        """Which of the unique draws each of `ids` can be."""
        if self.borders is None:
            raise ValueError("draws with replacement have no strata")
        places = ids if self.places is None else self.places[ids]
        return torch.searchsorted(self.borders[1:], places, right=True)

    def log_expected_counts(self, ids: Tensor) -> Tensor:
        """Log of how many of the draws are expected to be each of `ids`, float64."""
        mass = self._mass(ids)
        if self.borders is None:
            return (mass * (self.num_samples / TOTAL)).log()
        stratum, starts = self.stratum(ids), self.cumulative[self.borders]
        return (mass / _real(starts[stratum + 1] - starts[stratum])).log()

    def log_inclusion(self, ids: Tensor) -> Tensor:
        """Log of the probability that each of `ids` is drawn at all, float64."""
        if self.unique:
            return self.log_expected_counts(ids)
        missed = self.num_samples * torch.log1p(-self._mass(ids) / TOTAL)
        return (-torch.expm1(missed)).log()

    def _mass(self, ids: Tensor) -> Tensor:
        places = ids if self.places is None else self.places[ids]
        return _real(self.cumulative[places + 1] - self.cumulative[places])

    def extra_repr(self) -> str:
        """Sizes, for `print(noise)`."""
        words = self.cumulative.shape[0] - 1
        return f"vocab_size={words}, num_samples={self.num_samples}, unique={self.unique}"


def _real(whole: Tensor) -> Tensor:
    """float64, where the device has it."""
    return whole.to(torch.float32 if whole.device.type == "mps" else torch.float64)


def is_real(value: object) -> bool:
    """Whether a value is a number, and not True."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _masses(
    noise: NoiseKind | Tensor | Sequence[float], vocab_size: int, counts: Tensor | None
) -> Tensor:
    """Unnormalised masses of all words, float64 on the CPU."""
    if isinstance(noise, Tensor):
        return _checked(noise, vocab_size)
    if isinstance(noise, Sequence) and not isinstance(noise, str):
        wrong = [mass for mass in noise if not is_real(mass)]
        if wrong:
            raise ValueError(f"noise must be one number a word, got {type(wrong[0]).__name__}")
        return _checked(torch.tensor(noise, dtype=torch.float64, device="cpu"), vocab_size)
    if noise == "uniform":
        return torch.ones(vocab_size, dtype=torch.float64, device="cpu")
    if noise == "log_uniform":
        rank = torch.arange(1, vocab_size + 1, dtype=torch.float64, device="cpu")
        return torch.log1p(1 / rank)
    if noise == "unigram":
        ranked = zipf_counts(vocab_size) if counts is None else counts.to("cpu", torch.float64)
        return ranked.clamp(min=1)
    got = repr(noise) if isinstance(noise, str) else type(noise).__name__
    raise ValueError(
        f'noise must be "log_uniform", "unigram", "uniform" or masses of all words, got {got}'
    )


def _checked(masses: Tensor, vocab_size: int) -> Tensor:
    if masses.shape != (vocab_size,):
        raise ValueError(f"noise must be one mass a word, ({vocab_size},), got {(*masses.shape,)}")
    if masses.is_complex():
        raise ValueError(f"noise must be real masses, got {masses.dtype}")
    given = masses.detach().to("cpu", torch.float64, copy=True)
    wrong = (~((given > 0) & given.isfinite())).nonzero()
    if wrong.numel():
        word = int(wrong[0])
        raise ValueError(
            f"noise must be above 0 and finite for every word: word {word} has"
            f" {given[word].item()}, {len(wrong)} such words in all"
        )
    return given


def _cumulative(masses: Tensor) -> Tensor:
    """Running sum `(V + 1,)` of whole masses of at least 1 that sum to `TOTAL`."""
    shares = masses / masses.sum()
    whole = (shares * (TOTAL - len(masses))).long() + 1
    whole[whole.argmax()] += TOTAL - whole.sum()  # what rounding left over
    return torch.cat([whole.new_zeros(1), whole.cumsum(0)])


def _strata(sizes: Tensor, num_samples: int) -> Tensor:
    """Where `num_samples` strata of about equal mass begin, and the number of words.

    A word counts as its expected number of draws, but at most as one, in fixed point. Its stratum
    is the whole part of the running sum of that at its middle. From one word's middle to the next
    one's is never more than one, exactly so because integers are added: no stratum is empty.

    Args:
        sizes: Masses in descending order.
        num_samples: Number of strata.
    """
    expected = _capped_counts(sizes.double(), num_samples)
    fixed = (expected * STRATUM).round().long()
    middles = 2 * fixed.cumsum(0) - fixed
    stratum = (middles // (2 * STRATUM)).clamp(max=num_samples - 1)
    numbers = torch.arange(num_samples, device="cpu")
    starts = torch.searchsorted(stratum, numbers)
    assert torch.equal(stratum[starts], numbers), "a stratum without words"
    return torch.cat([starts, starts.new_tensor([len(stratum)])])


def _capped_counts(masses: Tensor, num_samples: int) -> Tensor:
    """`min(1, c * masses)`, with the `c` for which they sum to `num_samples`."""
    rest = masses.flip(0).cumsum(0).flip(0)  # of each word and all that are rarer
    draws = num_samples - torch.arange(len(masses), device="cpu")
    fits = draws * masses <= rest
    first = int(fits.long().argmax())  # the most frequent word that is not capped
    return (masses * (draws[first] / rest[first])).clamp(max=1)


def _share_of(sizes: Tensor, point: Tensor) -> Tensor:
    """`sizes * point / TOTAL`, within 2 below it, in integers: both factors are up to `TOTAL`."""
    half = 31
    low = 2**half - 1
    high_size, low_size = sizes >> half, sizes & low
    high, rest = point >> half, point & low
    return high_size * high + ((high_size * rest + low_size * high) >> half)
