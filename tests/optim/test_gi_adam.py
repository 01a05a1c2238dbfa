import copy
import io
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_warmup import GIAdamW

KERNELS = [{"foreach": False, "fused": False}, {"foreach": True}, {"fused": True}]
IDS = ["single", "foreach", "fused"]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=IDS)


def parameters(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def set_gradients(params, generator):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


class Written:
    """One parameter's GI-AdamW, written out from paper.md; α = 1 and v_0 = g_0² unless v0 is given."""

    def __init__(self, theta, betas, eps, decay, *, maximize=False, amsgrad=False, v0=None, alpha=1.0):
        self.x, self.m, self.v, self.t, self.largest = theta.detach().clone(), 0.0, v0, 0, 0.0
        self.betas, self.eps, self.decay, self.alpha = betas, eps, decay, alpha
        self.sign, self.amsgrad = (-1 if maximize else 1), amsgrad

    def step(self, g, lr):
        g, (beta1, beta2) = self.sign * g, self.betas
        self.t += 1
        self.v = self.alpha * g**2 if self.v is None else self.v
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.largest = torch.maximum(torch.as_tensor(self.largest), self.v) if self.amsgrad else self.v
        root = (self.largest / (1 - beta2**self.t)).sqrt() + self.eps
        self.x = (1 - lr * self.decay) * self.x - lr * (self.m / (1 - beta1**self.t)) / root


@every_kernel
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_constant_gradient_warms_up_as_sqrt_one_minus_beta2_to_the_t(beta2, kernel):
    # arXiv:2406.09405: v_t = g² for all t, so the bias correction alone sets the step length.
    theta = torch.zeros(4, requires_grad=True, dtype=torch.float64)
    optimizer = GIAdamW([theta], lr=0.1, betas=(0.9, beta2), eps=0.0, weight_decay=0.0, **kernel)
    gradient = torch.tensor([1e-3, -1.0, 7.0, -1e3], dtype=torch.float64)

    for t in range(1, 51):
        before = theta.detach().clone()
        theta.grad = gradient.clone()
        optimizer.step()
        expected = -0.1 * (1 - beta2**t) ** 0.5 * gradient.sign()
        torch.testing.assert_close(theta.detach() - before, expected, rtol=1e-12, atol=1e-14)


@every_kernel
@pytest.mark.parametrize(
    ("betas", "eps", "decay"), [((0.9, 0.999), 1e-8, 0.01), ((0.9, 0.95), 1e-8, 0.3), ((0.0, 0.5), 1e-2, 0.0)]
)
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"amsgrad": True}], ids=["plain", "maximize", "amsgrad"])
def test_matches_the_update_written_out(betas, eps, decay, options, kernel):
    params = parameters((5,), (2, 3), ())
    optimizer = GIAdamW(params, 0.1, betas, eps, decay, **options, **kernel)
    written = [Written(p, betas, eps, decay, **options) for p in params]
    generator = torch.Generator().manual_seed(1)

    for t in range(30):
        lr = 0.1 / (1 + t)
        optimizer.param_groups[0]["lr"] = lr
        set_gradients(params, generator)
        for p, expected in zip(params, written, strict=True):
            expected.step(p.grad, lr)
        optimizer.step()
        for p, expected in zip(params, written, strict=True):
            torch.testing.assert_close(p.detach(), expected.x, rtol=1e-12, atol=1e-14)


@every_kernel
def test_groups_keep_their_own_options(kernel):
    params = parameters((5,), (4,))
    options = [{"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.3}, {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.0}]
    optimizer = GIAdamW([{"params": [p], **o} for p, o in zip(params, options, strict=True)], **kernel)
    written = [Written(params[0], (0.9, 0.99), 1e-8, 0.3), Written(params[1], (0.9, 0.999), 1e-3, 0.0)]
    generator = torch.Generator().manual_seed(1)

    for _ in range(30):
        set_gradients(params, generator)
        for p, expected, o in zip(params, written, options, strict=True):
            expected.step(p.grad, o["lr"])
        optimizer.step()

    for p, expected in zip(params, written, strict=True):
        torch.testing.assert_close(p.detach(), expected.x, rtol=1e-12, atol=1e-14)


# torch's foreach kernel refuses a tensor lr on the CPU (it needs capturable, which needs a GPU).
@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[2]], ids=["single", "fused"])
def test_learning_rate_may_be_a_tensor(kernel):
    numbers, tensors = parameters((5,)), parameters((5,))
    a = GIAdamW(numbers, 0.1, **kernel)
    b = GIAdamW(tensors, torch.tensor(0.1, dtype=torch.float64), **kernel)
    for params, optimizer in [(numbers, a), (tensors, b)]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            set_gradients(params, generator)
            optimizer.step()
    torch.testing.assert_close(tensors[0], numbers[0], rtol=1e-12, atol=1e-14)


@every_kernel
def test_alpha_scales_the_second_moment_at_birth(kernel):
    params = parameters((5,))
    optimizer = GIAdamW(params, 0.1, (0.9, 0.99), v0=100.0, **kernel)
    written = Written(params[0], (0.9, 0.99), 1e-8, 1e-2, alpha=100.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        set_gradients(params, generator)
        written.step(params[0].grad, 0.1)
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), written.x, rtol=1e-12, atol=1e-14)


def v0_of(optimizer, p, beta2):
    """v_0 from v_1 = β2 v_0 + (1-β2) g_1²."""
    return (optimizer.state[p]["exp_avg_sq"] - (1 - beta2) * p.grad**2) / beta2


@pytest.mark.parametrize("v0", ["gradient", 10.0])
def test_parameters_without_a_gradient_or_with_a_zero_one_hold_nobody_up(v0):
    used, unused, idle = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = GIAdamW([used, unused, idle], 0.1, v0=v0)
    for _ in range(3):
        used.grad, idle.grad = torch.ones(3), torch.zeros(3)
        optimizer.step()
    assert not torch.equal(used, torch.ones(3))
    assert torch.equal(unused, torch.ones(3))
    idle.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[idle]["step"] == 1
    assert optimizer.state[used]["step"] == 4


@every_kernel
def test_second_moment_can_be_seeded_by_another_batch(kernel):
    # The authors' code: g_0 from a batch drawn before the loop, step 1 on the next one.
    params = parameters((5,), (3,))
    optimizer = GIAdamW(params, 0.1, (0.9, 0.99), weight_decay=0.0, **kernel)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    written = [Written(p, (0.9, 0.99), 1e-8, 0.0, v0=g**2) for p, g in zip(params, grads, strict=True)]

    optimizer.seed_second_moment(grads)
    assert all(p.grad is None for p in params)
    for _ in range(30):
        set_gradients(params, generator)
        for p, expected in zip(params, written, strict=True):
            expected.step(p.grad, 0.1)
        optimizer.step()

    for p, expected in zip(params, written, strict=True):
        torch.testing.assert_close(p.detach(), expected.x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sigma", ["gradient", 10.0])
def test_seeded_by_several_batches_v0_is_the_squared_mean_plus_the_variance(sigma):
    # arXiv:2412.02153: v_0 = σ (E[g]² + Var[g]), m_0 = 0. None is a gradient of zero.
    params = parameters((5,), (2, 3))
    optimizer = GIAdamW(params, 0.1, (0.9, 0.99), v0=sigma)
    generator = torch.Generator().manual_seed(1)
    batches = [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params] for _ in range(4)]
    alpha, written = 1.0 if sigma == "gradient" else sigma, []
    for i, p in enumerate(params):
        g = torch.stack([grads[i] * (i == 0 or grads is not batches[2]) for grads in batches])
        v0 = alpha * (g.mean(0) ** 2 + g.var(0, correction=0))
        written.append(Written(p, (0.9, 0.99), 1e-8, 1e-2, v0=v0))
    batches[2][1] = None

    optimizer.seed_second_moment(*batches)
    for _ in range(30):
        set_gradients(params, generator)
        for p, expected in zip(params, written, strict=True):
            expected.step(p.grad, 0.1)
        optimizer.step()
    for p, expected in zip(params, written, strict=True):
        torch.testing.assert_close(p.detach(), expected.x, rtol=1e-10, atol=1e-14)


def test_seeding_leaves_parameters_gradients_and_random_numbers_alone():
    params = parameters((5,), (3,))
    set_gradients(params, torch.Generator().manual_seed(1))
    before, held = [(p.detach().clone(), p.grad.clone()) for p in params], [p.grad for p in params]
    batches = [[torch.ones(5), torch.ones(3)], [torch.ones(5), None]]
    numbers = torch.get_rng_state()
    GIAdamW(params, v0=2.0).seed_second_moment(*batches)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(g, torch.ones_like(g)) for grads in batches for g in grads if g is not None)
    for p, (value, grad), gradient in zip(params, before, held, strict=True):
        assert p.grad is gradient
        assert torch.equal(p, value)
        assert torch.equal(gradient, grad)


def test_squares_of_many_batches_are_added_in_single_precision():
    (p,) = parameters((64,), dtype=torch.bfloat16)
    optimizer = GIAdamW([p], 0.1, (0.9, 0.5))
    optimizer.seed_second_moment(*([p.detach()] for _ in range(300)))
    # Three roundings to 8 bits; in bfloat16 a sum stands still where a part is 1/256 of it.
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), p.detach().double() ** 2, rtol=2**-6, atol=0)


def test_seeding_survives_a_checkpoint_and_is_refused_when_late_or_ill_shaped():
    params = parameters((5,), (3,))
    optimizer = GIAdamW(params)
    with pytest.raises(ValueError, match="got 1 for 2"):
        optimizer.seed_second_moment([torch.ones(5)])
    with pytest.raises(ValueError, match="shaped like"):
        optimizer.seed_second_moment([torch.ones(5), torch.ones(3)], [torch.ones(5), torch.ones(4)])
    with pytest.raises(ValueError, match="at least one batch, got none"):
        optimizer.seed_second_moment()
    optimizer.seed_second_moment([torch.ones(5), torch.zeros(3)])
    resumed = GIAdamW(params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(params, torch.Generator().manual_seed(1))
    resumed.step()
    torch.testing.assert_close(v0_of(resumed, params[0], 0.999), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(v0_of(resumed, params[1], 0.999), params[1].grad ** 2)
    with pytest.raises(RuntimeError, match="before the first step"):
        resumed.seed_second_moment([torch.ones(5), torch.ones(3)])


@every_kernel
def test_a_parameter_is_born_at_its_first_nonzero_gradient(kernel):
    # One entry is not zero at step 4: the whole tensor is born, with step 1 of its own.
    params = parameters((5,), (3,))
    optimizer = GIAdamW(params, 0.1, (0.9, 0.99), weight_decay=0.3, **kernel)
    written = [Written(p, (0.9, 0.99), 1e-8, 0.3) for p in params]
    generator = torch.Generator().manual_seed(1)

    for t in range(10):
        set_gradients(params, generator)
        if t < 4:
            params[1].grad.zero_()
        zero = params[1].grad
        written[0].step(params[0].grad, 0.1)
        if t < 4:
            written[1].x = written[1].x * (1 - 0.1 * 0.3)  # decay alone, as under AdamW
        else:
            written[1].step(params[1].grad, 0.1)
        optimizer.step()
        assert params[1].grad is zero
        assert optimizer.state[params[1]]["step"] == max(0, t - 3)
        for p, expected in zip(params, written, strict=True):
            torch.testing.assert_close(p.detach(), expected.x, rtol=1e-12, atol=1e-14)


def test_waiting_goes_on_after_a_checkpoint():
    params = parameters((3,))
    optimizer = GIAdamW(params, 0.1)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    resumed = GIAdamW(params, 0.1)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step()
    params[0].grad = torch.full_like(params[0], 2.0)
    resumed.step()
    torch.testing.assert_close(v0_of(resumed, params[0], 0.999), torch.full_like(params[0], 4.0))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@every_kernel
def test_once_born_a_step_does_just_what_adamw_does(kernel):
    # So nothing more is launched, copied or waited for.
    def operations(cls):
        params = parameters((5,), (3,))
        params.append(torch.zeros(2, requires_grad=True))  # never gets a gradient
        optimizer = cls(params, 0.1, **kernel)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            set_gradients(params[:2], generator)
            with Operations() as seen:
                optimizer.step()
        return seen.names

    assert operations(GIAdamW) == operations(torch.optim.AdamW)


@pytest.mark.parametrize("clip", [False, True], ids=["no clipping", "clipping"])
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_grad_scaler_gives_the_unscaled_square_and_an_overflow_leaves_no_state(kernel, clip):
    params = parameters((5,), (3,), dtype=torch.float32)
    optimizer = GIAdamW(params, 0.1, (0.9, 0.5), **kernel)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(p.shape, generator=generator) for p in params]

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(factor * sum((p * f).sum() for p, f in zip(params, factors, strict=True))).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()

    before = [p.detach().clone() for p in params]
    step(float("inf"))
    assert not optimizer.state
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))

    step(1.0)
    norm = torch.cat([f.flatten() for f in factors]).norm()
    for p, factor in zip(params, factors, strict=True):
        g = factor / torch.clamp(norm, min=1.0) if clip else factor
        # v_1 = β2 g² + (1-β2) g² = g²
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], g**2, rtol=1e-4, atol=0)
        assert optimizer.state[p]["step"] == 1


def test_an_overflow_spoils_neither_the_born_nor_the_waiting():
    params = parameters((5,), (3,), dtype=torch.float32)
    optimizer = GIAdamW(params, 0.1, fused=True, weight_decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for first, second in [(1.0, 0.0), (float("inf"), 1.0), (1.0, 1.0)]:
        saved = [p.detach().clone() for p in params]
        optimizer.zero_grad()
        scaler.scale(first * params[0].sum() + second * params[1].sum()).backward()
        overflow = first == float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, s) == overflow for p, s in zip(params, saved, strict=True))
    assert optimizer.state[params[0]]["step"] == 2
    assert optimizer.state[params[1]]["step"] == 1
    torch.testing.assert_close(optimizer.state[params[1]]["exp_avg_sq"], torch.ones(3))


@every_kernel
def test_state_dict_has_adamws_keys_and_dtypes(kernel):
    def state(cls):
        params = parameters((5,), (3,), dtype=torch.bfloat16)
        optimizer = cls(params, 0.1, amsgrad=True, **kernel)
        set_gradients(params, torch.Generator().manual_seed(1))
        optimizer.step()
        return optimizer.state_dict()

    ours, theirs = state(GIAdamW), state(torch.optim.AdamW)
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for a, b in zip(ours["state"].values(), theirs["state"].values(), strict=True):
        assert {k: (v.dtype, v.shape) for k, v in a.items()} == {k: (v.dtype, v.shape) for k, v in b.items()}


@every_kernel
@pytest.mark.parametrize("way", ["to AdamW", "from AdamW"])
def test_checkpoints_go_on_in_the_other_optimizer(way, kernel):
    # Once born the two are the same optimizer, so the one that loads must go on bit for bit.
    first, then = (GIAdamW, torch.optim.AdamW) if way == "to AdamW" else (torch.optim.AdamW, GIAdamW)
    params = parameters((5,), (3,))
    optimizer = first(params, 0.1, **kernel)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        set_gradients(params, generator)
        optimizer.step()
    file = io.BytesIO()
    torch.save([p.detach() for p in params] + [optimizer.state_dict()], file)
    file.seek(0)
    *values, state_dict = torch.load(file, weights_only=True)
    others = [v.requires_grad_() for v in values]
    other = then(others, 0.5, **kernel)
    other.load_state_dict(state_dict)
    for _ in range(3):
        set_gradients(params, generator)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_parameter_added_later_is_born_at_its_own_first_step():
    params = parameters((5,), (3,))
    optimizer = GIAdamW(params[:1], 0.1, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        set_gradients(params[:1], generator)
        optimizer.step()
    optimizer.add_param_group({"params": [params[1]], "betas": (0.9, 0.5)})
    set_gradients(params, generator)
    optimizer.step()
    torch.testing.assert_close(v0_of(optimizer, params[1], 0.5), params[1].grad ** 2)
    assert optimizer.state[params[0]]["step"] == 4


def test_parameters_replaced_in_the_groups_are_born_too():
    # What FSDP2 and ZeRO do when they shard: new tensors in the old groups.
    old, new = parameters((5,)), parameters((4,))
    optimizer = GIAdamW(old, 0.1, (0.9, 0.5))
    optimizer.param_groups[0]["params"] = new
    set_gradients(new, torch.Generator().manual_seed(1))
    optimizer.step()
    torch.testing.assert_close(optimizer.state[new[0]]["exp_avg_sq"], new[0].grad ** 2)


def test_an_empty_state_that_someone_left_behind_by_looking_is_not_a_birth():
    # As DeepSpeed's ZeRO-1 and 2 do between the steps of their parameter groups.
    (p,) = parameters((3,))
    optimizer = GIAdamW([p])
    assert optimizer.state[p] == {}
    p.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], p.grad.square())


def test_a_parameter_that_this_process_has_nothing_of_waits_alone():
    empty, p = parameters((0,), (3,))
    optimizer = GIAdamW([empty, p])
    for _ in range(2):  # in the second step only the empty one is not born
        empty.grad, p.grad = torch.zeros_like(empty), torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_a_parameter_without_gradient_has_no_state_and_stays():
    params = parameters((5,), (3,))
    optimizer = GIAdamW(params, 0.1, weight_decay=0.5)
    before = params[1].detach().clone()
    set_gradients(params[:1], torch.Generator().manual_seed(1))
    optimizer.step()
    assert params[1] not in optimizer.state
    assert torch.equal(params[1], before)


@every_kernel
def test_bfloat16_parameters_keep_bfloat16_state(kernel):
    params = parameters((64,), dtype=torch.bfloat16)
    optimizer = GIAdamW(params, 0.1, (0.9, 0.5), **kernel)
    set_gradients(params, torch.Generator().manual_seed(1))
    optimizer.step()
    v = optimizer.state[params[0]]["exp_avg_sq"]
    assert v.dtype == torch.bfloat16
    # Two roundings to 8 bits: of v_0 and of v_1.
    torch.testing.assert_close(v.float(), params[0].grad.float() ** 2, rtol=2**-7, atol=0)


def test_complex_parameters_square_their_parts_one_by_one():
    complex_ = torch.randn(4, dtype=torch.complex128, requires_grad=True)
    parts = torch.view_as_real(complex_.detach()).clone().requires_grad_()
    optimizers = GIAdamW([complex_], 0.1), GIAdamW([parts], 0.1)
    for _ in range(3):
        complex_.grad = torch.randn(4, dtype=torch.complex128)
        parts.grad = torch.view_as_real(complex_.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(complex_.detach()), parts.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@every_kernel
def test_a_compiled_step_gives_birth_as_an_eager_one(kernel):
    # torch keeps the step count of a compiled AdamW in single precision: 1e-6 apart even for AdamW itself.
    def train(compiled):
        torch._dynamo.reset()
        params = parameters((5,), (3,), (4,))
        optimizer = GIAdamW(params, 0.1, **kernel)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        generator = torch.Generator().manual_seed(1)
        for t in range(8):
            set_gradients(params, generator)
            if t < 3:
                params[1].grad.zero_()
            step()
        return params

    for eager, compiled in zip(train(False), train(True), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(clone):
    params = parameters((5,), (3,))
    optimizer = GIAdamW(params, 0.1, (0.9, 0.9), v0=3.0)
    params[0].grad, params[1].grad = torch.ones_like(params[0]), torch.zeros_like(params[1])
    optimizer.step()
    twin = clone(optimizer)
    twins = twin.param_groups[0]["params"]
    for p, q in zip(params, twins, strict=True):
        q.grad = torch.full_like(q, 2.0)
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    torch.testing.assert_close(v0_of(twin, twins[1], 0.9), torch.full_like(twins[1], 12.0))


def test_closure_and_hooks_run_once_with_the_closures_gradients():
    torch.optim.AdamW(parameters((2,)))  # torch puts its hooks around AdamW.step here
    params = parameters((3,))
    optimizer = GIAdamW(params, 0.1, (0.9, 0.5))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        seen.append("closure")
        optimizer.zero_grad()
        loss = (params[0] * 3).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert seen == ["before", "closure", "after"]
    assert loss is not None
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg_sq"], torch.full_like(params[0], 9.0))


def test_autograd_goes_through_a_differentiable_step():
    theta = torch.tensor([1.0, -2.0], dtype=torch.float64)
    gradient = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)

    def step(g):
        p = theta.clone().requires_grad_()
        optimizer = GIAdamW([p], 0.1, differentiable=True, foreach=False, fused=False)
        q = p.clone()
        optimizer.param_groups[0]["params"] = [q]
        q.grad = g
        optimizer.step()
        return q

    # g / (√(g²) ...) does not depend on |g|: the derivative is that of the ε alone, about zero.
    assert torch.autograd.gradcheck(step, (gradient,))


@pytest.mark.parametrize("v0", ["zero", 0.0, -1, float("nan"), True, None])
def test_bad_v0_is_named(v0):
    with pytest.raises(ValueError, match="v0 must be"):
        GIAdamW(parameters((2,)), v0=v0)
