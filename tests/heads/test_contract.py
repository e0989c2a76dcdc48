"""One suite that every head passes, line by line of the contract."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from cases import CASES, counts_of, randomise
from torch.testing import assert_close

from lm_softmax.kernels import dense, products, workspace

SIZES = [(5, 7, (3,)), (13, 101, (2, 9)), (16, 33, (4, 1, 3))]  # hidden, vocabulary, batch
IGNORE = -100

heads = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def problem(case, size=SIZES[1], dtype=torch.float32, **options):
    hidden_size, vocab_size, batch = size
    head = randomise(case.make(hidden_size, vocab_size, counts_of(vocab_size), **options))
    hidden = torch.randn(*batch, hidden_size, dtype=dtype, requires_grad=True)
    target = torch.randint(vocab_size, batch)
    return head.to(dtype), hidden, target


def tolerance(dtype):
    return {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {}


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True)


def seeded(function, *args, **kwargs):
    """What a head that draws gives for the same draws each time."""
    torch.manual_seed(5)
    return function(*args, **kwargs)


@heads
@dtypes
@sizes
class TestDistribution:
    def test_is_normalised(self, case, size, dtype):
        head, hidden, _ = problem(case, size, dtype)
        log_probs = head.log_prob(hidden)
        assert log_probs.shape == (*hidden.shape[:-1], head.vocab_size)
        assert log_probs.dtype == dtype
        total = log_probs.logsumexp(-1)
        assert_close(total, torch.zeros_like(total), **tolerance(dtype))

    def test_of_a_target_is_the_gathered_one(self, case, size, dtype):
        head, hidden, target = problem(case, size, dtype)
        expected = head.log_prob(hidden).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        actual = head.log_prob(hidden, target)
        assert_close(actual, expected, **tolerance(dtype))
        weights = torch.randn_like(expected)
        assert_close(
            gradients((actual * weights).sum(), head, hidden),
            gradients((expected * weights).sum(), head, hidden),
            **tolerance(dtype),
        )

    def test_loss_is_its_negative_or_the_surrogate(self, case, size, dtype):
        head, hidden, target = problem(case, size, dtype)
        losses = seeded(head.loss, hidden, target, reduction="none")
        assert head.loss_is_nll == (case.surrogate is None)
        if head.loss_is_nll:
            assert_close(losses, -head.log_prob(hidden, target), rtol=0, atol=0)
        assert_close(losses, seeded(case.losses, head, hidden, target), **tolerance(dtype))

    def test_reductions_are_those_of_the_losses(self, case, size, dtype):
        head, hidden, target = problem(case, size, dtype)
        target.view(-1)[::3] = IGNORE
        losses = seeded(head.loss, hidden, target, reduction="none")
        assert losses.dtype == dtype
        assert (losses.view(-1)[::3] == 0).all()
        assert (head.log_prob(hidden, target).view(-1)[::3] == 0).all()
        count = (target != IGNORE).sum()
        for reduction, value in (("sum", losses.sum()), ("mean", losses.sum() / count)):
            loss = seeded(head.loss, hidden, target, reduction=reduction)
            assert_close(loss, value, **tolerance(dtype))
            assert_close(
                gradients(loss, head, hidden),
                gradients(value, head, hidden),
                **tolerance(dtype),
            )
        loss = seeded(head.loss, hidden, target)
        assert_close(seeded(head, hidden, target), loss, rtol=0, atol=0)
        assert_close(head(hidden), head.log_prob(hidden), rtol=0, atol=0)


@heads
class TestGradients:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_match_finite_differences(self, case, reduction):
        head, hidden, target = problem(case, (4, 11, (6,)), torch.float64)
        target[2] = IGNORE
        # latent weights take no part in the loss: their own tests say what their gradient is
        kept = {n: p for n, p in head.named_parameters() if not n.endswith("latent")}
        assert (len(kept) < len(list(head.parameters()))) == case.straight_through
        names = list(kept)

        def loss(hidden, *parameters):
            arguments = (hidden, target), {"reduction": reduction}
            named = {f"head.{name}": p for name, p in zip(names, parameters, strict=True)}
            return seeded(torch.func.functional_call, _Loss(head), named, *arguments)

        inputs = (hidden, *kept.values())
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=False)

    def test_of_absent_clusters_are_zero_and_not_none(self, case):
        head, hidden, target = problem(case)
        head.loss(hidden, torch.zeros_like(target)).backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_are_not_made_without_need(self, case, monkeypatch):
        head, hidden, target = problem(case)
        expected = seeded(head.loss, hidden, target).detach()
        for module, name in ((dense, "add_gradients"), (products, "accumulate")):
            monkeypatch.setattr(module, name, None)  # calling it would fail
        with torch.no_grad():
            assert_close(seeded(head.loss, hidden, target), expected)
        frozen = copy.deepcopy(head).requires_grad_(False)
        loss = seeded(frozen.loss, hidden.detach(), target)
        assert not loss.requires_grad
        assert_close(loss, expected)

    def test_of_frozen_parameters_are_not_returned(self, case):
        head, hidden, target = problem(case)
        *frozen, last = head.parameters()
        expected = gradients(seeded(head.loss, hidden, target), head, hidden)[-1]
        for parameter in frozen:
            parameter.requires_grad_(False)
        seeded(head.loss, hidden.detach(), target).backward()
        assert all(parameter.grad is None for parameter in frozen)
        assert_close(last.grad, expected)

    def test_survive_a_second_step_and_interleaving(self, case):
        head, hidden, target = problem(case)
        other = torch.randn_like(hidden)
        expected = gradients(seeded(head.loss, hidden, target), head, hidden)
        first, second = seeded(head.loss, hidden, target), head.loss(other, target.flip(0))
        second.backward()
        head.zero_grad()
        first.backward()
        kept = [hidden.grad, *(parameter.grad for parameter in head.parameters())]
        head.loss(other, target.flip(0))  # reuses every work buffer
        assert_close(kept, list(expected))
        buffers = {held.untyped_storage().data_ptr() for held in workspace._buffers.held.values()}
        assert not buffers & {grad.untyped_storage().data_ptr() for grad in kept}

    def test_of_a_second_backward_are_right(self, case):
        head, hidden, target = problem(case)
        for reduction in ("none", "mean"):
            loss = head.loss(hidden, target, reduction=reduction).sum()
            first = torch.autograd.grad(loss, hidden, retain_graph=True)
            assert_close(torch.autograd.grad(loss * 3, hidden), (3 * first[0],))

    def test_double_backward_is_right_or_refused(self, case):
        if case.twice:
            head, hidden, target = problem(case, (4, 11, (6,)), torch.float64)
            assert torch.autograd.gradgradcheck(lambda h: seeded(head.loss, h, target), (hidden,))
            return
        head, hidden, target = problem(case)
        for reduction in ("none", "mean"):
            loss = head.loss(hidden, target, reduction=reduction).sum()
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(loss, hidden, create_graph=True)

    def test_follow_the_incoming_gradient(self, case):
        head, hidden, target = problem(case, dtype=torch.float64)
        expected = gradients(seeded(head.loss, hidden, target), head, hidden)
        scaled = gradients(seeded(head.loss, hidden, target) * -2.5, head, hidden)
        assert_close(scaled, tuple(-2.5 * gradient for gradient in expected))


class _Loss(torch.nn.Module):
    """So that `functional_call` reaches a method other than forward."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden, target, reduction):
        return self.head.loss(hidden, target, reduction=reduction)


@heads
class TestShapesAndTargets:
    @pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0), (2, 3, 4)], ids=str)
    def test_any_leading_shape(self, case, batch):
        head, hidden, target = problem(case, (6, 23, batch))
        flat = hidden.reshape(-1, 6), target.reshape(-1)
        assert head.log_prob(hidden).shape == (*batch, 23)
        assert_close(head.log_prob(hidden, target).reshape(-1), head.log_prob(*flat))
        assert head.loss(hidden, target, reduction="none").shape == batch
        assert head.loss(hidden, target).shape == ()
        assert head.topk(hidden, 3).indices.shape == (*batch, 3)
        assert head.topk(hidden, 3).log_probs.shape == (*batch, 3)
        assert head.sample(hidden, 4).shape == (*batch, 4)

    @pytest.mark.parametrize("batch", [(0,), (3, 2)], ids=["empty", "all ignored"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_nothing_to_predict_costs_nothing(self, case, batch, reduction):
        head, hidden, target = problem(case, (6, 23, batch))
        loss = head.loss(hidden, torch.full_like(target, IGNORE), reduction=reduction).sum()
        assert loss == 0
        for gradient in gradients(loss, head, hidden):
            assert (gradient == 0).all()

    def test_ignored_positions_change_nothing(self, case):
        head, hidden, target = problem(case, dtype=torch.float64)
        expected = seeded(head.loss, hidden, target)
        expected_gradients = gradients(expected, head, hidden)
        noise = torch.full((1, *hidden.shape[1:]), torch.nan, dtype=torch.float64)
        longer = torch.cat([noise, hidden])
        padded = torch.cat([torch.full_like(target[:1], IGNORE), target])
        loss = seeded(head.loss, longer, padded)
        assert_close(loss, expected)
        assert_close(gradients(loss, head, hidden), expected_gradients)
        assert_close(head.log_prob(longer, padded)[1:], head.log_prob(hidden, target))

    def test_another_ignore_index(self, case):
        head, hidden, target = problem(case, ignore_index=-1)
        target[0] = -1
        assert (head.loss(hidden, target, reduction="none")[0] == 0).all()
        target[0] = IGNORE
        with pytest.raises(ValueError, match=r"-100"):
            head.loss(hidden, target)

    def test_order_of_the_batch_does_not_matter(self, case):
        head, hidden, target = problem(case, dtype=torch.float64)
        flat, wanted = hidden.flatten(0, 1), target.flatten()
        order = torch.randperm(len(wanted))
        expected = seeded(head.loss, flat, wanted, reduction="none")[order]
        found = seeded(head.loss, flat[order], wanted[order], reduction="none")
        assert_close(found, expected)

    def test_non_contiguous_input(self, case):
        head, hidden, target = problem(case)
        turned, wanted = hidden.transpose(0, 1), target.t()
        expected = seeded(head.loss, hidden, target)
        assert_close(seeded(head.loss, turned, wanted), expected)

    def test_last_and_first_ids(self, case):
        head, hidden, _ = problem(case)
        for word in (0, head.vocab_size - 1):
            target = torch.full(hidden.shape[:-1], word)
            assert_close(head.log_prob(hidden, target), head.log_prob(hidden)[..., word])

    @pytest.mark.parametrize("word", [-1, -101, 101, 2**40])
    def test_targets_out_of_range_are_refused(self, case, word):
        head, hidden, target = problem(case)
        target[1, 2] = word
        for call in (head.loss, head.log_prob, head):
            with pytest.raises(ValueError, match=rf"\[0, 101\).*got {word} "):
                call(hidden, target)

    def test_wrong_inputs_are_refused(self, case):
        head, hidden, target = problem(case)
        with pytest.raises(ValueError, match=r"\(\*batch, 13\), got \(2, 9, 12\)"):
            head.loss(hidden[..., 1:], target)
        with pytest.raises(ValueError, match=r"\(2, 9\), got \(2, 8\)"):
            head.log_prob(hidden, target[:, 1:])
        with pytest.raises(ValueError, match=r"int64, got torch.int32"):
            head.loss(hidden, target.int())
        with pytest.raises(ValueError, match=r"floating point, got torch.int64"):
            head.log_prob(hidden.long())
        with pytest.raises(ValueError, match="'men'"):
            head.loss(hidden, target, reduction="men")


@heads
class TestPrecision:
    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("mode", ["autocast", "hidden", "module"])
    def test_low_precision_is_no_worse_than_the_naive_code(self, case, low, mode):
        head, hidden, target = problem(case, (64, 203, (900,)))
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(parameter.shape[-1] ** -0.5)
        if mode == "module":
            head = head.to(low)
        if mode != "autocast":
            hidden = hidden.detach().to(low).requires_grad_()
        exact = copy.deepcopy(head).double()
        exact_hidden = hidden.detach().double().requires_grad_()
        expected = seeded(exact.loss, exact_hidden, target, reduction="none")
        wanted = gradients(expected.mean(), exact, exact_hidden)
        with torch.autocast("cpu", low, enabled=mode == "autocast"):
            losses = seeded(head.loss, hidden, target, reduction="none")
            mean = seeded(head.loss, hidden, target)
            log_probs = head.log_prob(hidden)
            naive = seeded(case.losses, head, hidden, target)
        for result in (losses, mean, log_probs):
            assert result.dtype == torch.float32
        error, naive_error = ((result - expected).norm() for result in (losses, naive))
        assert error <= 1.1 * naive_error + 1e-6 * expected.norm()
        assert_close(mean, losses.mean())
        found, of_naive = gradients(mean, head, hidden), gradients(naive.mean(), head, hidden)
        for right, ours, theirs in zip(wanted, found, of_naive, strict=True):
            scale = right.norm().clamp(min=1e-12)
            assert (ours - right).norm() <= 1.1 * (theirs - right).norm() + 1e-5 * scale

    def test_gradients_of_rare_words_survive_a_late_scale(self, case):
        """A GradScaler's factor arrives in backward: until then p / N must not flush to 0."""
        head, hidden, target = problem(case, (8, 4001, (64,)))
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(0.1)
        exact = gradients(seeded(head.double().loss, hidden.double(), target), head, hidden)
        head.float()
        with torch.autocast("cpu", torch.float16):
            loss = seeded(head.loss, hidden, target)
        found = gradients(loss * 2.0**16, head, hidden)
        for right, ours in zip(exact, found, strict=True):
            assert ((ours == 0) <= (right == 0)).float().mean() == 1
            assert (ours / 2.0**16 - right).norm() <= 0.01 * right.norm()

    def test_extreme_logits(self, case):
        head, hidden, target = problem(case, (4, 57, (40,)), torch.float32)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(300)
        exact = copy.deepcopy(head).double()
        expected = exact.log_prob(hidden.double()).gather(-1, target[:, None]).squeeze(-1)
        assert_close(head.log_prob(hidden, target).double(), expected, rtol=3e-6, atol=1e-3)
        for gradient in gradients(head.loss(hidden, target), head, hidden):
            assert gradient.isfinite().all()

    def test_confident_words_are_as_exact_as_the_naive_code(self, case):
        """Losses near 0 next to large logits: -log p, not a difference of large numbers."""
        head, hidden, _ = problem(case, (4, 57, (400,)))
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(6)
        target = head.topk(hidden, 1).indices.squeeze(-1)
        exact = copy.deepcopy(head).double()
        expected = case.naive(exact, hidden.double()).gather(-1, target[:, None]).squeeze(-1)
        naive = case.naive(head, hidden).gather(-1, target[:, None]).squeeze(-1)
        error = (head.log_prob(hidden, target) - expected).abs().mean()
        assert error <= 1.1 * (naive - expected).abs().mean() + 1e-7

    def test_float64_stays_float64_under_autocast(self, case):
        head, hidden, target = problem(case, dtype=torch.float64)
        expected = seeded(head.loss, hidden, target)
        with torch.autocast("cpu", torch.bfloat16):
            loss = seeded(head.loss, hidden, target)
        assert_close(loss, expected, rtol=1e-12, atol=0)


@heads
class TestTopK:
    @dtypes
    def test_is_a_stable_sort(self, case, dtype):
        head, hidden, _ = problem(case, (13, 101, (5, 3)), dtype)
        log_probs = head.log_prob(hidden)
        order = log_probs.sort(stable=True, dim=-1, descending=True)
        for k in (1, 2, 50, 101):
            found = head.topk(hidden, k)
            assert_close(found.log_probs, order.values[..., :k])
            assert_close(log_probs.gather(-1, found.indices), found.log_probs)
            assert (found.indices == order.indices[..., :k]).all()
            assert not found.log_probs.requires_grad

    def test_ties_go_to_the_lower_id(self, case):
        head, hidden, _ = problem(case)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
        indices = head.topk(hidden, 7).indices
        order = head.log_prob(hidden).sort(stable=True, dim=-1, descending=True).indices
        assert (indices == order[..., :7]).all()

    @pytest.mark.parametrize("k", [0, -1, 102, 2.0])
    def test_bad_k(self, case, k):
        head, hidden, _ = problem(case)
        with pytest.raises(ValueError, match=rf"\[1, vocab_size=101\], got {k}"):
            head.topk(hidden, k)


def chi_square(drawn, probabilities):
    """How likely draws this far off are: Pearson's test, rare words pooled."""
    expected = probabilities * drawn.numel()
    observed = drawn.flatten().bincount(minlength=len(probabilities)).double()
    common = expected >= 5
    assert (observed[probabilities == 0] == 0).all()
    observed = torch.cat([observed[common], observed[~common].sum().view(1)])
    expected = torch.cat([expected[common], expected[~common].sum().view(1)])
    likely = expected >= 1
    terms = (observed - expected)[likely] ** 2 / expected[likely]
    degrees = likely.sum().double() - 1
    return torch.special.gammaincc(degrees / 2, terms.sum() / 2).item() if degrees else 1.0


@heads
class TestSample:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"temperature": 0.5},
            {"temperature": 1.5},
            {"top_k": 6},
            {"top_p": 0.7},
            {"temperature": 1.5, "top_k": 20, "top_p": 0.8},
        ],
        ids=str,
    )
    def test_frequencies_are_the_distribution(self, case, options):
        head, _, _ = problem(case, (6, 43, ()), torch.float64)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(0.5)
        hidden = torch.randn(2, 6, dtype=torch.float64)
        generator = torch.Generator().manual_seed(7)
        drawn = head.sample(hidden, 20_000, generator=generator, **options)
        for row, log_probs in zip(drawn, head.log_prob(hidden), strict=True):
            assert chi_square(row, truncated(log_probs, **options)) > 1e-4

    def test_extreme_temperatures(self, case):
        head, hidden, _ = problem(case)
        best = head.topk(hidden, 1).indices
        assert (head.sample(hidden, 2, temperature=1e-310) == best).all()
        hidden = torch.full_like(hidden, torch.nan)
        with pytest.raises(ValueError, match="nan"):
            head.sample(hidden)

    def test_generator_decides(self, case):
        head, hidden, _ = problem(case)
        draws = [
            head.sample(hidden, 5, generator=torch.Generator().manual_seed(seed))
            for seed in (3, 3, 4)
        ]
        assert (draws[0] == draws[1]).all()
        assert (draws[0] != draws[2]).any()

    def test_temperature_zero_is_greedy(self, case):
        head, hidden, _ = problem(case)
        best = head.topk(hidden, 1).indices
        assert (head.sample(hidden, 3, temperature=0) == best).all()
        assert (head.sample(hidden, 3, top_k=1) == best).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
            ({"num_samples": 2.5}, "num_samples must be a whole number of at least 1, got 2.5"),
            ({"top_k": 2.5}, "top_k must be in .*, got 2.5"),
            ({"temperature": -0.5}, "got -0.5"),
            ({"temperature": float("nan")}, "got nan"),
            ({"top_k": 0}, "got 0"),
            ({"top_k": 102}, "got 102"),
            ({"top_p": 0.0}, "got 0.0"),
            ({"top_p": 1.1}, "got 1.1"),
        ],
        ids=str,
    )
    def test_bad_options(self, case, options, message):
        head, hidden, _ = problem(case)
        with pytest.raises(ValueError, match=message):
            head.sample(hidden, **options)


def truncated(log_probs, temperature=1.0, top_k=None, top_p=None):
    """Temperature, then the k best, then the nucleus, word by word."""
    weights = (log_probs.double() / temperature).exp()
    ranked = sorted(range(len(weights)), key=lambda word: -weights[word].item())
    kept = ranked[:top_k]
    if top_p is not None:
        total, mass, nucleus = sum(weights[word] for word in kept), 0.0, []
        for word in kept:
            if mass >= top_p * total:
                break
            nucleus.append(word)
            mass += weights[word]
        kept = nucleus
    result = torch.zeros_like(weights)
    result[kept] = weights[kept]
    return result / result.sum()


@heads
class TestModule:
    def test_only_three_arguments_are_positional(self, case):
        head, _, _ = problem(case)
        parameters = list(inspect.signature(type(head).__init__).parameters.values())[1:]
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == ["hidden_size", "vocab_size", "counts"]
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[3:])

    def test_training_mode_changes_nothing(self, case):
        head, hidden, target = problem(case)
        expected = seeded(head.loss, hidden, target)
        assert_close(seeded(head.eval().loss, hidden, target), expected, rtol=0, atol=0)

    def test_copies_and_round_trips(self, case):
        head, hidden, target = problem(case)
        expected = seeded(head.loss, hidden, target)
        head.loss(hidden, target).backward()
        for clone in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert_close(seeded(clone.loss, hidden, target), expected, rtol=0, atol=0)
        file = io.BytesIO()
        torch.save(head.state_dict(), file)
        file.seek(0)
        rebuilt = case.make(head.hidden_size, head.vocab_size, counts_of(head.vocab_size))
        rebuilt.load_state_dict(torch.load(file, weights_only=True))
        assert_close(seeded(rebuilt.loss, hidden, target), expected, rtol=0, atol=0)

    def test_structure_needs_no_counts(self, case):
        counts = torch.tensor([10**6] * 30 + [1] * 4970)
        with_counts = case.make(8, 5000, counts)
        without = case.make(8, 5000, **with_counts.structure())
        shapes = {name: value.shape for name, value in with_counts.state_dict().items()}
        assert {name: value.shape for name, value in without.state_dict().items()} == shapes

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            (torch.ones(100), r"\(101,\), got \(100,\)"),
            (torch.arange(101), "word 2 has count 2 after 1"),
            (torch.linspace(5, -1, 101), "0 or at least 1, got 0.9"),
            (1 / torch.arange(1.0, 102), "0 or at least 1, got 0.5"),
            ([1] * 101, r"\(101,\), got list"),
            (torch.full((101,), torch.inf), "finite"),
        ],
        ids=["length", "order", "negative", "frequencies", "list", "infinite"],
    )
    def test_bad_counts(self, case, counts, message):
        with pytest.raises(ValueError, match=message):
            case.make(13, 101, counts)

    def test_bad_sizes(self, case):
        for arguments in ((0, 10), (10, 0), (-3, 5), (8.0, 10)):
            with pytest.raises(ValueError, match=f"{arguments[0]} and {arguments[1]}"):
                case.make(*arguments)
        with pytest.raises(ValueError, match=r"ignore_index.*got 5"):
            case.make(4, 10, ignore_index=5)

    def test_counts_of_zero_count_as_one(self, case):
        zeros, ones = torch.tensor([9, 4, 1, 0, 0, 0]), torch.tensor([9, 4, 1, 1, 1, 1])
        torch.manual_seed(1)
        first = case.make(3, 6, zeros)
        torch.manual_seed(1)
        second = case.make(3, 6, ones)
        assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)

    def test_moves_between_dtypes_and_devices(self, case):
        head, hidden, target = problem(case)
        expected = seeded(head.loss, hidden, target)
        moved = head.double().float()
        assert_close(seeded(moved.loss, hidden, target), expected, rtol=0, atol=0)
        counts = counts_of(head.vocab_size)
        with torch.device("meta"):
            abstract = case.make(head.hidden_size, head.vocab_size, counts)
        assert all(parameter.is_meta for parameter in abstract.parameters())
        assert abstract.loss(hidden.to("meta"), target.to("meta")).is_meta
        assert abstract.log_prob(hidden.to("meta")).shape == (*hidden.shape[:-1], head.vocab_size)

    def test_compiles_as_one_graph(self, case):
        head, hidden, target = problem(case)
        target[0, 0] = IGNORE

        def step(hidden, target):
            return head.loss(hidden * 1.0, target) + head.log_prob(hidden, target).sum()

        expected = seeded(step, hidden, target)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        compiled = seeded(compiled, hidden, target)
        assert_close(compiled, expected)
        assert_close(gradients(compiled, head, hidden), gradients(expected, head, hidden))

    def test_compiled_targets_out_of_range_are_nan(self, case):
        head, hidden, target = problem(case)
        target[0, 0] = head.vocab_size
        compiled = torch.compile(head.loss, fullgraph=True, backend="aot_eager")
        assert compiled(hidden, target).isnan()
