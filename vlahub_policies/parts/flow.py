"""Flow matching: the training pair, the sampler, and the stochastic steps that give a flow policy log-probabilities.

The convention of the pi0 family, opposite to the paper: t = 1 is noise, t = 0 is data, x_t = t * noise + (1 - t) * actions, and the network predicts the
velocity v = noise - actions. Sampling walks from t = 1 to t = 0. From v follow an estimate of the data, x0 = x - t v, and one of the noise, x1 = x + (1 - t) v;
every method below sets the mean of the next point to w0 x0 + w1 x1 and adds noise of some standard deviation:

| method     | w0          | w1                               | standard deviation                                                 |
|------------|-------------|----------------------------------|--------------------------------------------------------------------|
| ode        | 1 - t'      | t'                               | 0 (an Euler step)                                                  |
| flow_sde   | 1 - t'      | t' - sigma^2 (t - t') / (2 t)    | sigma sqrt(t - t'), sigma = noise_level sqrt(t / (1 - t))          |
| flow_cps   | 1 - t'      | t' cos(pi noise_level / 2)       | t' sin(pi noise_level / 2)                                         |
| flow_noise | 1 - t'      | t'                               | learned by a head, per element                                     |

The noise of a step may be correlated along the chunk (`correlation`): white noise on every action makes a path shake, which a controller follows slowly or not at all, while
a shift of neighbouring actions together is another way of doing the task. The density stays exact; see `normal_log_prob`.

What a small network leaves of the noise that it starts from shakes the path as well. `start_noise` scales it; at 0 denoising starts from the noise's mean, which is one
smooth chunk per observation.

Substituting x0 and x1, a step is `x' = keep x + move v + spread noise` with numbers that are known in advance. `Schedule` holds them, so one loop runs them all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from vlahub_policies.parts import randomness

METHODS = ("ode", "flow_sde", "flow_cps", "flow_noise")

# streams of a row's seeds
INITIAL, STEPS, DRAWN_STEP, TRAINING_NOISE, TRAINING_TIME = range(5)


# ------------------------------------------------------------------------------------------------ training


def sample_time(seeds: randomness.Seeds, device: torch.device | str = "cpu") -> torch.Tensor:
    """t [B] ~ 0.001 + 0.999 Beta(1.5, 1): more weight on noisy points, and never exactly 0."""
    unit = randomness.uniform(seeds, (), TRAINING_TIME, device)
    return 0.001 + 0.999 * unit ** (1 / 1.5)  # the inverse of Beta(1.5, 1)'s distribution function


def interpolate(actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, the velocity to predict) for actions and noise [B, H, D] and time [B]."""
    t = time[:, None, None]
    return t * noise + (1 - t) * actions, noise - actions


def time_embedding(time: torch.Tensor, width: int, min_period: float = 4e-3, max_period: float = 4.0) -> torch.Tensor:
    """[B] -> [B, width] float32: sines, then cosines, of geometrically spaced periods.

    Computed in float64: the shortest period is 0.004, so that a rounding error of 1e-7 in t already shows as 1e-4 here.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = (2 * math.pi / period) * time.double()[:, None]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


# ------------------------------------------------------------------------------------------------ schedules


@dataclass(frozen=True)
class Schedule:
    """The steps of one denoising run, float32: x[i + 1] = keep[i] x[i] + move[i] v(x[i], time[i]) + spread[i] noise.

    `keep`, `move` and `spread` are [n], or [n, B] where the rows of a batch differ. For a learned spread it is 1 where the head's standard deviation applies and 0 elsewhere.
    """

    time: torch.Tensor  # [n]
    keep: torch.Tensor
    move: torch.Tensor
    spread: torch.Tensor

    def to(self, device: torch.device | str) -> "Schedule":
        return Schedule(*(getattr(self, field.name).to(device) for field in fields(self)))


def euler(steps: int) -> Schedule:
    """Plain integration with the clock of the published samplers: t starts at 1 and -1/n is added in float32, whose rounding the time embedding sees."""
    dt, t, times = torch.tensor(-1.0 / steps, dtype=torch.float32), torch.tensor(1.0, dtype=torch.float32), []
    for _ in range(steps):
        times.append(t)
        t = t + dt
    time = torch.stack(times)
    return Schedule(time, torch.ones(steps), dt.expand(steps).clone(), torch.zeros(steps))


def grid(steps: int) -> torch.Tensor:
    """The n + 1 time points of a run whose transitions are scored, float32."""
    return torch.cat([torch.linspace(1.0, 1.0 / steps, steps), torch.zeros(1)])


def schedule(method: str, steps: int, noise_level: float = 0.5) -> Schedule:
    """Every step by the same method of the table above."""
    if method not in METHODS:
        raise ValueError(f"noise_method {method!r} is unknown; known are {', '.join(METHODS)}")
    times = grid(steps).double()
    t, after = times[:-1], times[1:]
    if method == "flow_sde":
        # sigma is infinite at t = 1; the first step takes the denominator of the second point instead
        sigma = noise_level * (t / (1 - torch.where(t == 1, times[1], t))).sqrt()
        noise_weight, spread = after - sigma**2 * (t - after) / (2 * t), sigma * (t - after).sqrt()
    elif method == "flow_cps":
        noise_weight, spread = after * math.cos(math.pi * noise_level / 2), after * math.sin(math.pi * noise_level / 2)
    else:
        noise_weight, spread = after, torch.full_like(t, float(method == "flow_noise"))
    data_weight = 1 - after
    keep, move = data_weight + noise_weight, noise_weight * (1 - t) - data_weight * t
    return Schedule(t.float(), keep.float(), move.float(), spread.float())


def stochastic_at(method: str, steps: int, noise_level: float, index: torch.Tensor) -> Schedule:
    """[n, B] numbers: row b takes step index[b] by `method` and all others by the ODE."""
    chosen = torch.arange(steps)[:, None] == index.cpu()[None]
    noisy, plain = schedule(method, steps, noise_level), schedule("ode", steps)
    mixed = {name: torch.where(chosen, getattr(noisy, name)[:, None], getattr(plain, name)[:, None]) for name in ("keep", "move", "spread")}
    return replace(noisy, **mixed)


# ------------------------------------------------------------------------------------------------ densities


def correlate(noise: torch.Tensor, correlation: float) -> torch.Tensor:
    """White noise [..., H, D] -> noise of unit variance in which neighbouring actions correlate by `correlation` (an autoregressive process along H)."""
    if not correlation:
        return noise
    lag = torch.arange(noise.shape[-2], device=noise.device)
    mix = correlation ** (lag[:, None] - lag[None]).clamp(min=0) * (lag[:, None] >= lag[None])  # [H, H], lower triangular
    mix[:, 1:] *= math.sqrt(1 - correlation**2)
    return mix.to(noise.dtype) @ noise


def normal_log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, correlation: float = 0.0) -> torch.Tensor:
    """Element-wise log-density [..., H, D]; 0 where std is 0 (a deterministic step has none).

    With correlated noise an element's density is conditional on the actions before it, so that the sum over the first N actions is the density of those N together.
    """
    certain = std == 0
    safe = torch.where(certain, torch.ones_like(std), std)
    unit, spread = (x - mean) / safe, safe
    if correlation:
        innovation = math.sqrt(1 - correlation**2)
        unit = torch.cat([unit[..., :1, :], (unit[..., 1:, :] - correlation * unit[..., :-1, :]) / innovation], dim=-2)
        spread = torch.cat([safe[..., :1, :], safe[..., 1:, :] * innovation], dim=-2)
    density = -spread.log() - 0.5 * math.log(2 * math.pi) - 0.5 * unit**2
    return torch.where(certain, torch.zeros_like(density), density)


def normal_entropy(std: torch.Tensor, correlation: float = 0.0) -> torch.Tensor:
    """Element-wise, conditional like the density above; 0 where std is 0."""
    certain = std == 0
    entropy = 0.5 * math.log(2 * math.pi * math.e) + torch.where(certain, torch.ones_like(std), std).log()
    entropy[..., 1:, :] += 0.5 * math.log(1 - correlation**2)
    return torch.where(certain, torch.zeros_like(std), entropy)


# ------------------------------------------------------------------------------------------------ exploring and scoring


@dataclass
class Denoised:
    """What a policy's network says at one point (x, t)."""

    velocity: torch.Tensor  # [B, H, D] float32
    spread: torch.Tensor | None = None  # [B, H, D]: the noise head's standard deviation, for flow_noise
    value: torch.Tensor | None = None  # [B, 1]: the critic, if it looks at the action expert


Denoise = Callable[[torch.Tensor, torch.Tensor], Denoised]  # (x [B, H, D], t [B]) -> Denoised


@dataclass
class Walk:
    """A run from noise to actions."""

    chain: torch.Tensor  # [B, n + 1, H, D]
    spread: torch.Tensor  # [B, n, H, D], or broadcastable to it
    mean: torch.Tensor  # [B, n, H, D]
    value: torch.Tensor | None  # [B, n]


def walk(denoise: Denoise, x: torch.Tensor, plan: Schedule, noise: torch.Tensor | None) -> Walk:
    """Run a schedule from x [B, H, D] at t = 1. `noise` [B, n, H, D] may be None if no step is stochastic."""
    chain, means, spreads, values = [x], [], [], []
    for i, t in enumerate(plan.time):
        point = denoise(x, t.expand(len(x)))
        keep, move, spread = (_per_row(table[i]) for table in (plan.keep, plan.move, plan.spread))
        mean = keep * x + move * point.velocity
        if point.spread is not None:
            spread = spread * point.spread
        x = mean if noise is None else mean + spread * noise[:, i]
        chain.append(x)
        means.append(mean)
        spreads.append(spread.expand_as(x))
        values.append(point.value)
    value = None if values[0] is None else torch.cat(values, dim=1)
    return Walk(torch.stack(chain, 1), torch.stack(spreads, 1), torch.stack(means, 1), value)


def _per_row(number: torch.Tensor) -> torch.Tensor:
    """[] or [B] -> broadcastable to [B, H, D]."""
    return number[..., None, None]


@dataclass(frozen=True)
class Exploration:
    """How a flow policy explores."""

    method: str = "flow_sde"
    steps: int = 10
    noise_level: float = 0.5
    joint: bool = False  # every step stochastic, log-probabilities averaged; else one step per row, scored alone:
    step: str = "drawn"  # ... drawn per row, or the "last" that adds noise. Noise of earlier steps is mostly denoised away, and with it what can be learnt
    correlation: float = 0.0  # of the noise of neighbouring actions of a chunk
    start_noise: float = 1.0  # scale of the noise that denoising starts from

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"noise_method {self.method!r} is unknown; known are {', '.join(METHODS)}")
        if self.step not in ("drawn", "last"):
            raise ValueError(f"noise_step must be 'drawn' or 'last', not {self.step!r}")
        if not 0 <= self.correlation < 1:
            raise ValueError(f"noise_correlation must be at least 0 and below 1, not {self.correlation}")
        if not 0 <= self.start_noise <= 1:
            raise ValueError(f"start_noise must be from 0 to 1, not {self.start_noise}")
        if self.steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {self.steps}")


def initial(how: Exploration, seeds: randomness.Seeds, shape: tuple[int, int], device: torch.device | str) -> torch.Tensor:
    """Where denoising starts, [B, H, D]."""
    return how.start_noise * randomness.normal(seeds, shape, INITIAL, device)


Run = Callable[[torch.Tensor, Schedule, torch.Tensor | None], Walk]  # (x, plan, noise) -> Walk; `functools.partial(walk, denoise)`, or a compiled form of it


def explore(
    run: Run, shape: tuple[int, int], seeds: randomness.Seeds, how: Exploration, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """Sample actions. Returns (actions [B, H, D], log_prob [B, H, D], value [B, 1] or None, trace) where the trace is what `score` needs.

    Joint: the log-probability is the mean over the initial noise and the n transitions, the value the mean over the n steps.
    Otherwise both belong to the one drawn step, so that `score` computes the same two numbers from the same point.
    """
    if how.method == "ode":
        raise ValueError("noise_method 'ode' is deterministic and has no log-probability; explore with flow_sde, flow_cps or flow_noise, or call predict")
    start = initial(how, seeds, shape, device)
    if how.joint:
        noise = correlate(randomness.normal(seeds, (how.steps, *shape), STEPS, device), how.correlation)
        taken = run(start, schedule(how.method, how.steps, how.noise_level).to(device), noise)
        terms = normal_log_prob(taken.chain[:, 1:], taken.mean, taken.spread, how.correlation)
        first = normal_log_prob(start, torch.zeros_like(start), torch.full_like(start, how.start_noise))
        log_prob = torch.cat([first[:, None], terms], 1).mean(1)
        value = None if taken.value is None else taken.value.mean(1, keepdim=True)
        return taken.chain[:, -1], log_prob, value, {"chain": taken.chain}
    drawable = int((schedule(how.method, how.steps, how.noise_level).spread > 0).sum())  # flow_cps adds no noise at its last step
    if not drawable:
        raise ValueError(f"noise_method {how.method!r} adds no noise in {how.steps} steps at noise_level {how.noise_level}; raise num_steps or noise_level")
    index = randomness.integers(seeds, drawable, DRAWN_STEP) if how.step == "drawn" else torch.full((len(start),), drawable - 1)
    noise = correlate(randomness.normal(seeds, (1, *shape), STEPS, device), how.correlation).expand(-1, how.steps, -1, -1)  # only the chosen step adds it
    taken = run(start, stochastic_at(how.method, how.steps, how.noise_level, index).to(device), noise)
    index, rows = index.to(device), torch.arange(len(start), device=device)
    log_prob = normal_log_prob(taken.chain[rows, index + 1], taken.mean[rows, index], taken.spread[rows, index], how.correlation)
    value = None if taken.value is None else taken.value[rows, index][:, None]
    transition = torch.stack([taken.chain[rows, index], taken.chain[rows, index + 1]], 1)  # [B, 2, H, D]
    return taken.chain[:, -1], log_prob, value, {"chain": transition, "step": index}


def score(denoise: Denoise, trace: dict[str, torch.Tensor], how: Exploration) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(log_prob [B, H, D], entropy [B, H, D], value [B, 1] or None) of a trace of `explore` under the present weights, with gradients.

    The entropy is that of the learned noise; it is 0 for the methods whose noise is fixed.
    """
    chain = trace["chain"]
    device = chain.device
    table = schedule(how.method, how.steps, how.noise_level).to(device)

    def transition(x: torch.Tensor, after: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        point = denoise(x, table.time[step])
        spread = _per_row(table.spread[step])
        spread = (spread if point.spread is None else spread * point.spread).expand_as(x)
        mean = _per_row(table.keep[step]) * x + _per_row(table.move[step]) * point.velocity
        entropy = normal_entropy(spread, how.correlation) if how.method == "flow_noise" else torch.zeros_like(mean)
        return normal_log_prob(after, mean, spread, how.correlation), entropy, point.value

    if not how.joint:
        return transition(chain[:, 0], chain[:, 1], trace["step"])
    start, spread = chain[:, 0], torch.full_like(chain[:, 0], how.start_noise)
    terms = [(normal_log_prob(start, torch.zeros_like(start), spread), normal_entropy(spread) * (how.method == "flow_noise"), None)]
    terms += [transition(chain[:, i], chain[:, i + 1], torch.full((len(chain),), i, device=device)) for i in range(how.steps)]
    log_prob, entropy = (torch.stack([term[part] for term in terms], 1).mean(1) for part in (0, 1))
    value = None if terms[1][2] is None else torch.cat([term[2] for term in terms[1:]], 1).mean(1, keepdim=True)
    return log_prob, entropy, value
