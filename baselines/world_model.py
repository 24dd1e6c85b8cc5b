"""Training the EVAC world model on recorded episodes, in one file: autoencoder, action converter, video UNet, success classifier; then a held-out report.

    vlahub record --env vlahub/LIBERO-Spatial --policy expert --episodes 200 --after 8 --env-options camera_size=(128,128) wrist=False --out data/expert
    vlahub record --env vlahub/LIBERO-Spatial --policy expert --episodes 100 --after 8 --noise 0.5 --no-only-successes ... --out data/noisy
    vlahub record --env vlahub/LIBERO-Spatial --policy random --episodes 50 --no-only-successes ... --out data/random
    python baselines/world_model.py --dataset data/expert data/noisy data/random --name spatial          # a tiny model from fresh weights
    python baselines/world_model.py --dataset data/expert --model jzndd/evac_for_rlinf --suite libero_spatial --bf16     # fine-tune the published one
    torchrun --nproc-per-node 8 baselines/world_model.py ...                                             # batches are those of all ranks together
    python baselines/world_model.py --resume runs/NAME                                                   # go on after the last finished stage
    python baselines/world_model.py --dataset data/other --init runs/NAME/release --report-only --held-out 1    # of episodes that these weights have not seen

The data are episodes of any environment with LIBERO's interface: hand pose and finger positions in the state, LIBERO's actions, one fixed camera. Failures
belong into them: a model that has seen successes only imagines nothing else. Stages, in this order:

 1. autoencoder (fresh models only): L1 loss on frames and trajectory maps with a small KL term; then its latents are brought to mean 0 and variance 1.
 2. converter: pose, last motion and action -> next pose, through chains of `chunk` steps, because that is how it is used.
 3. video: v-prediction on the chunk's frames. Memory frames get noise ("teacher forcing": the newest the most), because at inference they are the model's own. With
    u uniform and p = condition_dropout, the actions are zeroed for u < 2p, the picture for p <= u < 3p, the map for p/2 <= u < 3p/2, and mask and conditioning
    latent of the chunk for u < p/2, p <= u < 3p/2 and 5p/2 <= u < 7p/2. A fresh model trains its CLIP tower along; a pretrained one keeps it.
 4. classifier: success in one frame, on real frames and on frames that the model imagined of real actions, since it will judge imagined ones.

The report uses episodes that no stage saw (`held_out`), through the code of the environment: PSNR and SSIM of one chunk and of `report_chunks` in a row, beside the
autoencoder's own and those of a frozen picture; errors of the converter's poses; precision and recall of the classifier; videos, real on the left, imagined on the right;
of each video eight moments in one picture, real above imagined.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vlahub import distributed, video
from vlahub.dataset import Dataset, DatasetError, EpisodeEntry
from vlahub.distributed import Ranks, print0
from vlahub.run import arguments, divides
from vlahub.tracking import Tracker
from vlahub.vector import cores
from vlahub_envs.evac import conditioning, start_states
from vlahub_envs.evac.autoencoder import SCALE
from vlahub_envs.evac.model import WorldModel, memory_rows, tiny_config
from vlahub_envs.evac.simulation import Imagination, draw_maps, interface_of, pose_of, to_uint8, upright
from vlahub_envs.evac.start_states import StartState, StartStates

STAGES = {"autoencoder": 0.2, "converter": 0.07, "video": 0.63, "classifier": 0.1}  # and their shares of --seconds


@dataclass
class Args:
    dataset: tuple[str, ...] = ()
    """folders of LeRobot datasets, recorded by `vlahub record` with --after (8 or so)"""
    model: str = "tiny"
    """"tiny" (fresh weights, under four million), or a world model to fine-tune: folder or hub repository"""
    init: str = ""
    """with model "tiny": weights to begin with instead of fresh ones (a bundled id, or the folder model or release of another run); all stages train"""
    report_only: bool = False
    """train nothing: write the report of --init or --model as it is; with --held-out 1 on all episodes, if it has seen none of them"""
    suite: str = ""
    """of a repository that holds several world models"""
    out: str = "runs"
    """folder of all runs; this run gets a folder of its own below it"""
    name: str = ""
    """name of the run; made of model, seed and time if empty"""
    resume: str = ""
    """folder of a run to go on with after its last finished stage; it keeps its arguments"""
    seed: int = 0
    """seed of fresh weights, shuffles and noise"""
    device: str = "auto"
    """auto: this rank's GPU if there is one, else the CPU"""
    bf16: bool = False
    """compute in bfloat16; weights and optimizer stay in float32"""
    compile: bool = False
    """compile the video network"""
    track: bool = False
    """also log to Weights & Biases"""

    camera_position: tuple[float, float, float] = (0.6586, 0.0, 1.6104)
    """of a fresh model: where the camera stands (the default is LIBERO's tabletop agentview)"""
    camera_quaternion: tuple[float, float, float, float] = (0.6380, 0.3048, 0.3048, 0.6380)
    """its orientation, w x y z, in MuJoCo's axes"""
    camera_fovy: float = 45.0
    """its vertical field of view in degrees"""
    chunk: int = 8
    """of a fresh model: frames imagined at a time"""

    seconds: float = 0.0
    """time from the start of the program to the end of the last stage: each gets its share of what is left, if its iterations are not done before; 0: no limit"""
    autoencoder_iterations: int = 6000
    """optimizer steps of the autoencoder; 0 leaves a stage out"""
    converter_iterations: int = 6000
    """optimizer steps of the action converter"""
    video_iterations: int = 20000
    """optimizer steps of the video network"""
    classifier_iterations: int = 2000
    """optimizer steps of the success classifier"""
    autoencoder_batch: int = 64
    """frames per step, all ranks together"""
    converter_batch: int = 1024
    """chains per step"""
    video_batch: int = 128
    """clips per step"""
    classifier_batch: int = 256
    """frames per step"""
    autoencoder_rate: float = 1e-3
    """peak learning rate of the autoencoder"""
    converter_rate: float = 2e-3
    """peak learning rate of the converter"""
    video_rate: float = 6e-4
    """peak learning rate of the video network (5e-5 to fine-tune the published one)"""
    classifier_rate: float = 1e-3
    """peak learning rate of the classifier"""
    weight_decay: float = 1e-2
    """of AdamW"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    ema: float = 0.999
    """decay of the moving average of the video network's weights, which is what is saved; 0: none"""
    kl: float = 1e-4
    """weight of the autoencoder's KL term, a mean over latent numbers, beside the mean absolute error of pixels in [-1, 1]"""
    map_share: float = 0.1
    """share of trajectory maps in the autoencoder's batches"""
    memory_noise: tuple[int, int] = (3, 20)
    """memory frames are noised up to timestep 1000 / d, with d drawn from this range"""
    condition_dropout: float = 0.1
    """p of the table above"""
    success_share: float = 0.2
    """share of solved frames in the classifier's batches"""
    imagined_clips: int = 2000
    """chunks imagined for the classifier's training"""

    held_out: float = 0.1
    """share of starts (task and trial) whose episodes are kept for the report"""
    report_episodes: int = 20
    """held-out episodes that are imagined"""
    report_chunks: int = 8
    """chunks in a row"""
    videos: int = 4
    """side-by-side videos, each with a picture of eight of its moments"""
    start_trials: int = 3
    """start states per task that are written beside the model, those of the first trials that were recorded"""
    snapshot_seconds: float = 60.0
    """time between snapshots of the video network while it trains, into the run's folder snapshot, as a release is written; 0: none"""
    log_every: int = 200
    """steps between lines of the log"""


# ------------------------------------------------------------------------------------------------ data


@dataclass
class Episodes:
    """All frames of all episodes, in memory. F frames in E episodes."""

    frames: np.ndarray  # [F, H, W, 3] uint8
    poses: np.ndarray  # [F, 8] float32: xyz, quaternion xyzw, gripper
    actions: np.ndarray  # [F, 7] the action after each frame
    solved: np.ndarray  # [F] bool: is the task solved in this frame?
    first: np.ndarray  # [F] the first frame of each frame's episode ...
    last: np.ndarray  # [F] ... and the last
    held_out: np.ndarray  # [F] bool
    episodes: list[range]
    texts: list[str]
    numbers: list[tuple[int, int] | None]  # per episode its task and trial, where the recording tells

    def motion(self) -> np.ndarray:
        """[F, 8] the last change of each pose; 0 at an episode's start."""
        before = self.poses[np.maximum(np.arange(len(self.poses)) - 1, self.first)]
        return self.poses - before

    def clips(self, chunk: int, held_out: bool) -> np.ndarray:
        """Frames that `chunk` frames of the same episode follow."""
        frames = np.arange(len(self.poses))
        return frames[(frames + chunk <= self.last) & (self.held_out == held_out)]


def read_episodes(folders: Sequence[str], held_out: float, seed: int) -> Episodes:
    """Read the datasets. `held_out` of all starts (task and trial, where the recordings tell; else episodes) are kept for the report, with every episode from them."""
    parts: dict[str, list] = {name: [] for name in ("frames", "poses", "actions", "solved", "first", "last", "held_out")}
    episodes, texts, numbers, start = [], [], [], 0
    for folder in folders:
        data = Dataset(folder)
        if data.interface is None:
            raise DatasetError(f"{folder} does not say what its columns mean (it was not written by vlahub); record it with `vlahub record`")
        if len(data) < len(data.states):
            raise DatasetError(f"{folder}: a world model needs a picture of every step; record it without --look-every")
        height, width = data.features[data.columns.main_images]["shape"][:2]
        config = tiny_config(height, width, 8, {})
        wanted = interface_of(config)
        for what in ("state", "action"):
            mine, other = ([(one.name, one.size) for one in getattr(interface, what)] for interface in (wanted, data.interface))
            if mine != other:
                raise DatasetError(f"{folder}: a world model needs LIBERO's {what} ({mine}), these episodes have {other}")
        column = data.columns.main_images

        def pictures(entry: EpisodeEntry, data: Dataset = data, column: str = column) -> list[np.ndarray]:
            return [data._image(column, i) for i in range(entry.start, entry.start + entry.length)]

        with ThreadPoolExecutor(cores()) as pool:  # a thread reads whole episodes: neighbouring pictures are read together
            frames = np.stack([picture for part in pool.map(pictures, data.episodes) for picture in part])
        if parts["frames"] and frames.shape[1:] != parts["frames"][0].shape[1:]:
            raise DatasetError(f"{folder} has frames of {frames.shape[1:3]}, {folders[0]} of {parts['frames'][0].shape[1:3]}; record them at one size")
        poses = np.stack([pose_of(state, config) for state in data.states])
        after = data.column("next.success").astype(bool)
        recorded = _recorded_numbers(Path(folder))
        for entry in data.episodes:
            rows = slice(entry.start, entry.start + entry.length)
            quaternions = poses[rows, 3:7]
            flips = np.where((quaternions[1:] * quaternions[:-1]).sum(-1) < 0, -1, 1)
            quaternions *= np.cumprod([1, *flips])[:, None]  # q and -q are one rotation: the sign that continues the last frame's
            solved = np.concatenate([[False], after[rows][:-1]])  # a row's outcome is seen in the next frame
            for name, values in (("first", entry.start), ("last", entry.start + entry.length - 1)):
                parts[name].append(np.full(entry.length, start + values))
            parts["solved"].append(solved)
            episodes.append(range(start + entry.start, start + entry.start + entry.length))
            texts.append(data.texts[entry.start])
            numbers.append(recorded.get(entry.index))
        for name, values in (("frames", frames), ("poses", poses), ("actions", data.actions)):
            parts[name].append(values)
        start += len(data)
    keys: list[tuple[int, ...]] = [(i,) if number is None else number for i, number in enumerate(numbers)]
    # Every start draws for itself, so that a dataset which has grown (--resume) keeps what it kept before.
    draws = {key: np.random.default_rng([seed, *key]).random() for key in keys}
    kept = {key for key, draw in draws.items() if draw < held_out} or {min(draws, key=draws.__getitem__)}
    parts["held_out"] = [np.full(len(frames), key in kept) for frames, key in zip(episodes, keys, strict=True)]
    found = Episodes(**{name: np.concatenate(values) for name, values in parts.items()}, episodes=episodes, texts=texts, numbers=numbers)
    if not found.solved.any():
        raise DatasetError("no frame of these datasets shows a solved task, so the classifier has nothing to find: record successes with --after 8")
    return found


def _recorded_numbers(folder: Path) -> dict[int, tuple[int, int]]:
    """Episode -> (task, trial), of datasets that `vlahub record` made."""
    file = folder / "meta/recording.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["episode"]: (line["task"], line["trial"]) for line in lines if line["episode"] is not None}


def pixels(frames: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """[..., H, W, 3] uint8 -> [..., 3, H, W] in [-1, 1]"""
    return torch.as_tensor(frames).to(device).movedim(-1, -3).float() / 127.5 - 1


def kept(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """All pictures of the data, on the GPU if they take a quarter of its free memory at most: otherwise every batch travels."""
    fit = device.type != "cuda" or pictures.nbytes < torch.cuda.mem_get_info(device)[0] / 4
    return pictures.to(device) if fit else pictures


# ------------------------------------------------------------------------------------------------ the loop that all stages share


@dataclass
class Stage:
    """What every stage needs."""

    args: Args
    ranks: Ranks
    tracker: Tracker
    model: WorldModel
    data: Episodes
    frames: torch.Tensor  # [F, H, W, 3] uint8: the pictures of the data ...
    maps: torch.Tensor  # ... and the trajectory map of every pose
    todo: list[str]  # the stages that are still to be done, this one first
    started: float  # of the program, by its clock

    def pictures(self, which: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Rows [...] of `frames` or `maps` -> [..., 3, H, W] in [-1, 1], on the device"""
        return pixels(which[torch.from_numpy(rows).to(which.device)], self.ranks.device)

    def share(self, batch: int, name: str) -> int:
        divides(batch, self.ranks.world, name, "the number of ranks")
        return batch // self.ranks.world

    def rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.args.seed, self.ranks.rank, *key])

    def autocast(self):
        return torch.autocast(self.ranks.device.type, torch.bfloat16) if self.args.bf16 else nullcontext()

    def fit(
        self,
        name: str,
        parameters: Iterable[torch.nn.Parameter],
        loss_of: Callable[[np.random.Generator], torch.Tensor],
        after: Callable[[int], None] = lambda i: None,
    ) -> None:
        """`NAME_iterations` steps of AdamW on `loss_of(rng)`, with a linear warm-up over 100 steps and a cosine to zero."""
        args, count, peak = self.args, getattr(self.args, f"{name}_iterations"), getattr(self.args, f"{name}_rate")
        trained = list(parameters)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=args.weight_decay, betas=(0.9, 0.99), fused=self.ranks.device.type == "cuda")
        print0(f"{name}: {sum(p.numel() for p in trained):,} parameters, {count} iterations")
        losses, started, bad, progress = [], time.perf_counter(), 0, 0.0
        left = args.seconds - (started - self.started)
        limit = max(left, 0.001) * STAGES[name] / sum(STAGES[stage] for stage in self.todo) if args.seconds else math.inf
        torch.manual_seed(args.seed + 1000 * list(STAGES).index(name) + self.ranks.rank)
        for iteration in range(count):
            if iteration % 10 == 0:  # the first rank's clock holds for all
                progress = max(iteration / count, distributed.on_rank0(lambda: (time.perf_counter() - started) / limit) if args.seconds else 0.0)
            if progress >= 1:
                break
            rate = peak * min((iteration + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with self.autocast():
                loss = loss_of(self.rng(list(STAGES).index(name), iteration))
            loss.backward()
            distributed.average_gradients(trained)
            norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            if iteration % 10 == 0 and not torch.isfinite(norm):  # a look at a value waits for the GPU, so not at every step
                bad += 1
                if bad > 5:
                    raise FloatingPointError(f"{name}: gradients are not finite; lower --{name}-rate, or switch --bf16 off")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after(iteration)
            losses.append(loss.detach())
            if (iteration + 1) % args.log_every == 0:
                mean = distributed.total(torch.stack(losses).mean()).item() / self.ranks.world
                self.tracker.log(iteration + 1, {f"world/{name}_loss": mean, f"time/{name}": time.perf_counter() - started})
                losses = []
        for parameter in trained:
            parameter.requires_grad_(False)


# ------------------------------------------------------------------------------------------------ stages


def train_autoencoder(stage: Stage) -> None:
    args, data, model, device = stage.args, stage.data, stage.model, stage.ranks.device
    autoencoder, batch = model.first_stage_model.train(), stage.share(args.autoencoder_batch, "autoencoder_batch")
    seen = np.flatnonzero(~data.held_out)
    maps = round(args.map_share * batch)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        images = torch.cat([stage.pictures(stage.frames, rng.choice(seen, batch - maps)), stage.pictures(stage.maps, rng.choice(seen, maps))])
        mean, log_variance = autoencoder.posterior(images)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).mean()
        return F.l1_loss(autoencoder.decode(SCALE * latents).float(), images) + args.kl * kl

    stage.fit("autoencoder", autoencoder.parameters(), loss_of)
    autoencoder.eval()
    some = np.random.default_rng(args.seed).choice(seen, min(len(seen), 1024), replace=False)  # the same on every rank
    latents = encoded(model, stage.frames[torch.from_numpy(np.sort(some)).to(stage.frames.device)], device).transpose(0, 1).flatten(1)  # [channels, n]
    standardise(model, latents.mean(1), latents.std(1))


@torch.no_grad()
def standardise(model: WorldModel, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold a shift and a scale per channel into the 1x1 convolutions around the latents, so that these get mean 0 and variance 1."""
    quant, post = model.first_stage_model.quant_conv, model.first_stage_model.post_quant_conv
    n = len(mean)
    post.bias += (post.weight[:, :, 0, 0] * mean / SCALE).sum(1)
    post.weight *= std[None, :, None, None]
    quant.weight[:n] /= std[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - mean / SCALE) / std
    quant.bias[n:] -= 2 * std.log()  # the posterior's log-variance


@torch.no_grad()
def encoded(model: WorldModel, frames: np.ndarray | torch.Tensor, device: torch.device, batch: int = 256) -> torch.Tensor:
    """[n, H, W, 3] uint8 -> latents [n, 4, h, w], float32"""
    return torch.cat([model.encode(pixels(frames[i : i + batch], device)) for i in range(0, len(frames), batch)])


def train_converter(stage: Stage) -> None:
    args, data, device = stage.args, stage.data, stage.ranks.device
    converter, chunk = stage.model.action_predictor.train(), stage.model.config.chunk
    poses, actions = (torch.from_numpy(values).to(device) for values in (data.poses, data.actions))
    seen = ~data.held_out
    converter.abs_action_mean.copy_(poses[seen].mean(0, keepdim=True))
    converter.abs_action_std.copy_(poses[seen].std(0, keepdim=True).clamp(min=1e-3))  # quaternion entries hardly move in some data
    starts, batch = data.clips(chunk, held_out=False), stage.share(args.converter_batch, "converter_batch")
    motion = torch.from_numpy(data.motion()).to(device)
    if converter.motion:
        converter.motion_std.copy_(motion[seen].std(0, keepdim=True).clamp(min=1e-4))
    steps = torch.arange(chunk, device=device)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        at = torch.from_numpy(rng.choice(starts, batch)).to(device)
        with torch.autocast(device.type, enabled=False):  # bfloat16 has no millimetres
            reached = converter.chain(actions[at[:, None] + steps], poses[at], last=motion[at])
            return F.smooth_l1_loss(reached / converter.abs_action_std, poses[at[:, None] + 1 + steps] / converter.abs_action_std, beta=0.01)

    stage.fit("converter", converter.parameters(), loss_of)
    converter.eval()


def noised_memory(model: WorldModel, memory: torch.Tensor, rng: np.random.Generator, divisors: tuple[int, int]) -> torch.Tensor:
    """Memory latents [b, 4, m, h, w] with noise that grows towards the newest frame. Unlike noisy latents, memory is not rescaled."""
    b, _, m, _, _ = memory.shape
    highest = rng.random(b) * len(model.schedule.alphas_cumprod) / rng.integers(divisors[0], divisors[1] + 1, b)
    steps = (highest[:, None] * np.arange(1, m + 1) / m).astype(np.int64)  # [b, m]
    abar = torch.from_numpy(model.schedule.alphas_cumprod[steps]).to(memory)[:, None, :, None, None]
    return abar.sqrt() * memory + (1 - abar).sqrt() * torch.randn_like(memory)


def dropped(rng: np.random.Generator, batch: int, p: float) -> dict[str, np.ndarray]:
    """Which clips keep which condition, bool [b]. One draw decides all, so that every combination that guidance may ask for occurs."""
    u = rng.random(batch)
    mask = (u < 0.5 * p) | ((u >= p) & (u < 1.5 * p)) | ((u >= 2.5 * p) & (u < 3.5 * p))
    return {"actions": u >= 2 * p, "picture": (u < p) | (u >= 3 * p), "map": (u < 0.5 * p) | (u >= 1.5 * p), "mask": ~mask}


@dataclass
class Clips:
    """Latents of all frames and their maps, on the device."""

    frames: torch.Tensor  # [F, 4, h, w] float16
    maps: torch.Tensor  # [F, 4, h, w] float16
    rows: torch.Tensor  # [F, c, 14] the action rows of the chunk that follows each frame
    data: Episodes
    model: WorldModel

    def batch(self, at: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Memory [b, 4, m, h, w], chunk [b, 4, c, h, w], the maps' latents [b, 4, c, h, w] and action rows [b, c, 14] of the clips whose newest memory frame is `at`."""
        c, m, first = self.model.config.chunk, self.model.config.memory, self.data.first[at]
        # at inference the history begins with m copies of the first frame
        memory = first[:, None] + np.maximum(np.stack(memory_rows(at - first + m, m), axis=1) - (m - 1), 0)
        following = at[:, None] + 1 + np.arange(c)
        memory, following, at = (torch.from_numpy(index).to(self.frames.device) for index in (memory, following, at))
        latents = (self.frames[memory], self.frames[following], self.maps[following])
        return (*(values.float().transpose(1, 2) for values in latents), self.rows[at])


def clips_of(stage: Stage) -> Clips:
    data, model, device = stage.data, stage.model, stage.ranks.device
    rows = []
    for part in np.array_split(np.arange(len(data.poses)), -(-len(data.poses) // 1000)):
        poses = data.poses[np.minimum(part[:, None] + np.arange(model.config.chunk + 1), len(data.poses) - 1)]  # beyond an episode's end: never asked for
        rows.append(conditioning.normalised(conditioning.action_rows(np.concatenate([poses, poses], axis=-1))))
    latents = (encoded(model, pictures, device).half() for pictures in (stage.frames, stage.maps))
    return Clips(*latents, torch.from_numpy(np.concatenate(rows)).to(device), data, model)


def train_video(stage: Stage, clips: Clips, folder: Path) -> None:
    args, data, model, device = stage.args, stage.data, stage.model, stage.ranks.device
    parts = [model.unet, model.cond_stage_model, model.image_proj_model, *([model.embedder] if args.model == "tiny" else [])]
    starts, batch = data.clips(model.config.chunk, held_out=False), stage.share(args.video_batch, "video_batch")
    m, rays, count = model.config.memory, model.camera_rays(), len(model.schedule.alphas_cumprod)
    for part in parts:
        part.train()
    parameters = [parameter for part in parts for parameter in part.parameters()]
    average = [parameter.detach().clone() for parameter in parameters] if args.ema else []
    if args.compile:
        model.unet.forward = torch.compile(model.unet.forward, dynamic=False)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        at = rng.choice(starts, batch)
        memory, target, maps, rows = clips.batch(at)
        memory = noised_memory(model, memory, rng, args.memory_noise)
        keep = {name: torch.from_numpy(kept).to(device).float() for name, kept in dropped(rng, batch, args.condition_dropout).items()}
        pictures = stage.pictures(stage.frames, data.first[at]) * keep["picture"][:, None, None, None]
        actions = model.action_tokens(rows * keep["actions"][:, None, None])
        made = model.conditions_of_latents(memory, maps * keep["map"].view(-1, 1, 1, 1, 1), actions, model.image_tokens(pictures), rays)
        made.mask = torch.cat([made.mask[:, :, :m], made.mask[:, :, m:] * keep["mask"].view(-1, 1, 1, 1, 1)], dim=2)
        made.latent = made.latent * made.mask
        timesteps = torch.from_numpy(rng.integers(0, count, batch)).to(device)
        noisy, v = model.schedule.noised(target, torch.randn_like(target), timesteps)
        return F.mse_loss(model.network(made, m)(noisy, timesteps)[:, :, m:].float(), v)

    @torch.no_grad()
    def exchange() -> None:
        """The weights for their average, and the other way round."""
        for parameter, mean in zip(parameters, average, strict=False):
            now = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(now)

    written = time.perf_counter()

    def after(iteration: int) -> None:
        nonlocal written
        if average:  # it forgets faster at the start, so that it does not remember the fresh weights
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - min(args.ema, (1 + iteration) / (10 + iteration)))
        if stage.ranks.rank == 0 and args.snapshot_seconds and time.perf_counter() - written > args.snapshot_seconds:
            exchange()
            model.save_pretrained(str(folder / "snapshot"), dtype=torch.float16)
            exchange()
            written = time.perf_counter()

    stage.fit("video", parameters, loss_of, after)
    exchange()
    if args.compile:
        del model.unet.forward  # the class's own again
    for part in parts:
        part.eval()


@torch.no_grad()
def imagine_clips(stage: Stage, clips: Clips, at: np.ndarray, batch: int = 256) -> torch.Tensor:
    """Frames [n, c, 3, H, W] (float16, on the CPU) that the model imagines after real memory frames, with the real poses."""
    model, data, device = stage.model, stage.data, stage.ranks.device
    steps = model.schedule.steps(model.config.denoising_steps, model.config.eta, model.config.denoising_steps < 50, model.config.solver)
    found = []
    for i in range(0, len(at), batch):
        memory, target, maps, rows = clips.batch(at[i : i + batch])
        with stage.autocast():
            tokens = model.image_tokens(stage.pictures(stage.frames, data.first[at[i : i + batch]]))
            made = model.conditions_of_latents(memory, maps, model.action_tokens(rows), tokens, model.camera_rays())
            later = torch.randn(len(steps), *target.shape, device=device) if steps.sigmas.any() else None
            found.append(model.decode(model.imagine(made, steps, torch.randn_like(target), later)).clamp(-1, 1).half().cpu())
    return torch.cat(found)


def train_classifier(stage: Stage, clips: Clips) -> None:
    args, data, model, device = stage.args, stage.data, stage.model, stage.ranks.device
    classifier, batch, c = model.reward_model.train(), stage.share(args.classifier_batch, "classifier_batch"), model.config.chunk
    rng, starts = stage.rng(8), data.clips(model.config.chunk, held_out=False)
    ends_solved = starts[data.solved[starts + c]]
    clips_at = np.concatenate(
        [rng.choice(ends_solved if len(ends_solved) else starts, args.imagined_clips // 2), rng.choice(starts, args.imagined_clips - args.imagined_clips // 2)]
    )
    imagined = kept(imagine_clips(stage, clips, clips_at).flatten(0, 1), device) if len(clips_at) else torch.empty(0)  # [n * c, 3, H, W]
    of_imagined = data.solved[clips_at[:, None] + 1 + np.arange(c)].reshape(-1)
    seen = np.flatnonzero(~data.held_out)
    real = [seen[data.solved[seen] == wanted] for wanted in (False, True)]
    made = [np.flatnonzero(of_imagined == wanted) for wanted in (False, True)]
    half = batch // 2 if len(imagined) and min(map(len, made)) else 0  # of every batch imagined, half real

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        images, labels = [], []
        for pool, count in ((real, batch - half), (made, half)):
            positive = round(args.success_share * count)
            for wanted, number in ((0, count - positive), (1, positive)):
                chosen = rng.choice(pool[wanted], number)
                images.append(
                    stage.pictures(stage.frames, chosen) if pool is real else imagined[torch.from_numpy(chosen).to(imagined.device)].to(device).float()
                )
                labels.append(torch.full((number,), float(wanted), device=device))
        together = torch.cat(images)
        together = together + 0.02 * torch.randn_like(together)  # or it learns the texture of single frames
        return F.binary_cross_entropy_with_logits(classifier(together).float(), torch.cat(labels))

    stage.fit("classifier", classifier.parameters(), loss_of)
    classifier.eval()


# ------------------------------------------------------------------------------------------------ the report


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Images [n, 3, H, W] in [0, 1] -> dB, [n]"""
    return -10 * torch.log10(((a - b) ** 2).flatten(1).mean(1).clamp(min=1e-10))


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of images [n, 3, H, W] in [0, 1] -> [n]: Gaussian windows of 11 pixels with sigma 1.5, constants 0.01 and 0.03, mean over channels."""
    x = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2

    def blur(images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, window.expand(3, 1, 11, 11), groups=3)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


def alike(found: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Mean PSNR and SSIM of frames [..., H, W, 3] uint8."""
    a, b = (torch.from_numpy(np.ascontiguousarray(frames)).reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2).float() / 255 for frames in (found, real))
    values = [(psnr(x, y), ssim(x, y)) for x, y in zip(a.split(64), b.split(64), strict=True)]
    return float(torch.cat([p for p, _ in values]).mean()), float(torch.cat([s for _, s in values]).mean())


def precision_recall(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    hits = int((found & true).sum())
    return {
        "precision": hits / max(int(found.sum()), 1),
        "recall": hits / max(int(true.sum()), 1),
        "found": int(found.sum()),
        "true": int(true.sum()),
        "of": int(true.size),
    }


@torch.no_grad()
def report(stage: Stage, folder: Path) -> dict:
    """Figures on held-out episodes, through the environment's own code."""
    args, data, model, device = stage.args, stage.data, stage.model, stage.ranks.device
    c, long = model.config.chunk, model.config.chunk * args.report_chunks
    held = [i for i, frames in enumerate(data.episodes) if data.held_out[frames[0]] and len(frames) > c]
    order = np.random.default_rng(args.seed).permutation(held)[: args.report_episodes]
    if not len(order):
        print0("no held-out episode is long enough for a report; raise --held-out or record more")
        return {}
    imagination = Imagination(model)
    imagination.threshold = 1.0  # which no probability passes: worlds are imagined for as long as the real episode ran
    rng, motion = np.random.default_rng(args.seed + 1), data.motion()
    real, made, frozen, coded, probabilities, solved, poses, true_poses = ([] for _ in range(8))

    def world_at(episode: int, frame: int):
        """A world that has lived through the real episode up to `frame`."""
        frames = data.episodes[episode]
        world = imagination.world()
        start = {"image": data.frames[frames[0]], "pose": data.poses[frame], "text": data.texts[episode]}
        world.reset(int(rng.integers(2**31)), start)
        world.motion = motion[frame]
        imagination._encode_starts([world])
        if frame > frames[0]:
            lived = encoded(model, data.frames[frames[0] + 1 : frame + 1], device).transpose(0, 1)
            world.latents = torch.cat([world.latents, lived], dim=1)
        return world

    # one chunk after a real past, anywhere in the episodes
    at = [(i, int(rng.integers(data.episodes[i][0], data.episodes[i][-1] - c + 1))) for i in order for _ in range(2)]
    for k in range(0, len(at), 32):
        worlds = [world_at(*one) for one in at[k : k + 32]]
        imagination.advance(worlds, [data.actions[frame : frame + c] for _, frame in at[k : k + 32]])
        for (_, frame), world in zip(at[k : k + 32], worlds, strict=True):
            following = slice(frame + 1, frame + 1 + c)
            real.append(data.frames[following])
            made.append(world.frames)
            frozen.append(np.repeat(data.frames[frame : frame + 1], c, axis=0))
            coded.append(to_uint8(model.decode(encoded(model, data.frames[following], device).transpose(0, 1)[None])[0]).permute(0, 2, 3, 1).cpu().numpy())
            probabilities.append(world.outcomes.info["success_probability"])
            solved.append(data.solved[following])
            poses.append(world.pose)
            true_poses.append(data.poses[frame + c])
    result: dict = {"frames": len(data.poses), "episodes": len(data.episodes), "held_out_episodes": len(held)}
    for name, found in (("imagined", made), ("autoencoder", coded), ("frozen", frozen)):
        result[f"one_chunk_{name}"] = dict(zip(("psnr", "ssim"), alike(np.concatenate(found), np.concatenate(real)), strict=True))
    result["one_chunk_pose"] = pose_errors(np.stack(poses), np.stack(true_poses))
    # frames that can show a success: real ones of all held-out episodes, and imagined ones
    frames = np.flatnonzero(data.held_out)
    judged = torch.cat([model.reward_model(stage.pictures(stage.frames, frames[i : i + 256])).sigmoid().cpu() for i in range(0, len(frames), 256)]).numpy()
    result["classifier_real_frames"] = precision_recall(judged > 0.5, data.solved[frames])
    by_episode = [(bool((judged[np.isin(frames, list(data.episodes[i]))] > 0.5).any()), bool(data.solved[list(data.episodes[i])].any())) for i in held]
    result["classifier_real_episodes"] = precision_recall(*map(np.array, zip(*by_episode, strict=True)))

    # whole episodes from their first frame: `report_chunks` chunks for the pictures, to the end for the verdict
    worlds = [world_at(i, data.episodes[i][0]) for i in order]
    length = [len(data.episodes[i]) - 1 for i in order]
    films: list[list[np.ndarray]] = [[] for _ in order]
    verdicts: list[list[np.ndarray]] = [[] for _ in order]
    reached: list[list[np.ndarray]] = [[] for _ in order]
    for begin in range(0, max(length), c):
        live = [k for k, n in enumerate(length) if n > begin]
        imagination.advance([worlds[k] for k in live], [data.actions[data.episodes[order[k]][0] + begin :][: min(c, length[k] - begin)] for k in live])
        for k in live:
            films[k].append(worlds[k].frames)
            verdicts[k].append(worlds[k].outcomes.info["success_probability"])
            reached[k].append(worlds[k].pose)
    pairs = [(np.concatenate(films[k])[:long], data.frames[data.episodes[i][0] + 1 :][:long]) for k, i in enumerate(order) if length[k] >= long]
    if pairs:
        a, b = (np.stack(side) for side in zip(*pairs, strict=True))
        start = np.stack([data.frames[data.episodes[i][0]] for k, i in enumerate(order) if length[k] >= long])
        result["rollout"] = {"chunks": args.report_chunks, "episodes": len(pairs), **dict(zip(("psnr", "ssim"), alike(a, b), strict=True))}
        result["rollout_last_chunk"] = dict(zip(("psnr", "ssim"), alike(a[:, -c:], b[:, -c:]), strict=True))
        result["rollout_frozen"] = dict(zip(("psnr", "ssim"), alike(np.repeat(start[:, None], long, 1), b), strict=True))
        ends = [k for k in range(len(order)) if length[k] >= long]
        at_end = np.stack([reached[k][args.report_chunks - 1] for k in ends]), np.stack([data.poses[data.episodes[order[k]][0] + long] for k in ends])
        result["rollout_pose"] = pose_errors(*at_end)
    imagined_success = np.array([bool((np.concatenate(verdicts[k]) > 0.5).any()) for k in range(len(order))])
    real_success = np.array([bool(data.solved[list(data.episodes[i])].any()) for i in order])
    result["success_imagined_vs_real"] = precision_recall(imagined_success, real_success)

    for k in range(min(args.videos, len(order))):
        episode, film = data.episodes[order[k]], np.concatenate(films[k])
        judged_here = np.concatenate(verdicts[k])

        def picture(step: int, episode=episode, film=film, judged_here=judged_here, k=k) -> np.ndarray:
            real_frame, gap = upright(data.frames[episode[0] + 1 + step]), np.full((film.shape[1], 4, 3), 255, np.uint8)
            words = f"left real, right imagined   step {step + 1}   p(success) {judged_here[step]:.2f}" + (
                "   really solved" if data.solved[episode[0] + 1 + step] else ""
            )
            return video.caption(
                np.concatenate([real_frame, gap, upright(film[step])], axis=1), data.texts[order[k]], words, "good" if judged_here[step] > 0.5 else "plain"
            )

        video.save(folder / f"side_by_side_{k}.mp4", video.encode((picture(step) for step in range(len(film))), 20))
        shown = np.linspace(c - 1, len(film) - 1, 8).astype(int)
        rows = [np.concatenate([upright(frame) for frame in frames[shown]], axis=1) for frames in (data.frames[episode[0] + 1 :], film)]
        Image.fromarray(np.concatenate(rows)).save(folder / f"strip_{k}.png", optimize=True)
    return result


def pose_errors(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Poses [n, 8]: mean distance in mm, mean angle in degrees."""
    a, b = (quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True) for quaternion in (found[:, 3:7], true[:, 3:7]))
    angle = 2 * np.arccos(np.clip(np.abs((a * b).sum(-1)), 0, 1))
    return {"millimetres": float(1000 * np.linalg.norm(found[:, :3] - true[:, :3], axis=-1).mean()), "degrees": float(np.degrees(angle).mean())}


def write_starts(data: Episodes, folder: Path, trials: int) -> None:
    """First frames of the recorded episodes, by task and trial, as the start states of the environment."""
    order = {text: task for task, text in enumerate(sorted(set(data.texts)))}
    numbered = all(number is not None for number in data.numbers)
    found: dict[tuple[int, int], StartState] = {}
    counts = dict.fromkeys(order.values(), 0)
    for frames, text, number in zip(data.episodes, data.texts, data.numbers, strict=True):
        task, trial = number if numbered else (order[text], counts[order[text]])
        counts[order[text]] += 1
        if (task, trial) not in found:
            found[task, trial] = StartState(data.frames[frames[0]], data.poses[frames[0]], text, task, trial)
    of_task = {task: sorted(trial for other, trial in found if other == task)[:trials] for task, _ in found}
    chosen = [found[task, trial] for task in sorted(of_task) for trial in of_task[task]]
    start_states.write(StartStates(chosen), folder / start_states.FILE, quality=90)


# ------------------------------------------------------------------------------------------------ main


def make_model(args: Args, data: Episodes, folder: Path) -> WorldModel:
    """The model of the last finished stage, a pretrained one, or a fresh one."""
    saved = folder / "model"
    if args.resume and (saved / "config.json").exists():
        return WorldModel.from_pretrained(str(saved))
    height, width = data.frames.shape[1:3]
    if args.model == "tiny":
        torch.manual_seed(args.seed)
        camera = conditioning.mujoco_camera(args.camera_position, args.camera_quaternion, args.camera_fovy, height, width)
        config = tiny_config(height, width, args.chunk, camera)
        if not args.init:
            return WorldModel(config).eval().requires_grad_(False)
        model = WorldModel.from_pretrained(args.init, dtype=torch.float32)
        differ = [field.name for field in dataclasses.fields(config) if getattr(model.config, field.name) != getattr(config, field.name)]
        if differ:
            raise ValueError(f"--init {args.init} differs from the model that these arguments and data ask for, in {', '.join(differ)}")
        return model
    if args.init:
        raise ValueError("--init is for fresh models; --model names the weights that are fine-tuned")
    model = WorldModel.from_pretrained(args.model, suite=args.suite, dtype=torch.float32)
    if (model.config.height, model.config.width) != (height, width):
        raise DatasetError(f"{args.model} imagines {model.config.height}x{model.config.width}, the datasets have {height}x{width}; record them at its size")
    return model


def main(args: Args) -> None:
    started = time.perf_counter()
    if not args.dataset:
        raise ValueError("no dataset given: --dataset FOLDER (vlahub record makes one)")
    if not 0 < args.held_out < 1 and not (args.report_only and args.held_out == 1):
        raise ValueError(f"held_out must lie between 0 and 1 (1 only with --report-only), not {args.held_out}")
    if args.report_only and args.model == "tiny" and not args.init:
        raise ValueError("--report-only needs the weights to report on: --init FOLDER, or --model FOLDER of a pretrained one")
    ranks = distributed.setup(None if args.device == "auto" else args.device)
    name = args.name or f"world-{Path(args.model).name}-{args.seed}-{time.strftime('%m%d-%H%M%S')}"
    folder = Path(args.resume) if args.resume else Path(distributed.on_rank0(lambda: str(Path(args.out) / name)))
    done_file = folder / "stages.json"
    if not args.resume and done_file.exists():
        raise SystemExit(f"{folder} holds a run already: go on with it by --resume {folder}, or choose another --name")
    done: list[str] = json.loads(done_file.read_text()) if done_file.exists() else []
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    tracker = Tracker(folder, dataclasses.asdict(args), wandb=args.track, rank=ranks.rank)
    data = read_episodes(args.dataset, args.held_out, args.seed)
    solved = sum(bool(data.solved[list(frames)].any()) for frames in data.episodes)
    print0(f"run {folder}: {len(data.poses)} frames in {len(data.episodes)} episodes, {solved} of them solved, {int(data.solved.sum())} solved frames")
    model = make_model(args, data, folder).to(ranks.device)
    print0(f"{sum(tensor.numel() for tensor in model.state_dict().values()):,} parameters")
    maps = torch.cat([draw_maps(poses, model.config, ranks.device).cpu() for poses in np.array_split(data.poses, -(-len(data.poses) // 1000))])
    stages = () if args.report_only else STAGES
    todo = [what for what in stages if what not in done and getattr(args, f"{what}_iterations") and (what != "autoencoder" or args.model == "tiny")]
    stage = Stage(args, ranks, tracker, model, data, kept(torch.from_numpy(data.frames), ranks.device), kept(maps, ranks.device), todo, started)
    clips = None
    while todo:
        what = todo[0]
        if what in ("video", "classifier") and clips is None:
            clips = clips_of(stage)
        if what == "autoencoder":
            train_autoencoder(stage)
        elif what == "converter":
            train_converter(stage)
        elif what == "video":
            train_video(stage, clips, folder)
        else:
            train_classifier(stage, clips)
        done.append(todo.pop(0))

        def save() -> None:
            model.save_pretrained(str(folder / "model"))
            model.save_pretrained(str(folder / "release"), dtype=torch.float16)
            done_file.write_text(json.dumps(done) + "\n")

        distributed.on_rank0(save)

    def finish() -> None:
        release = folder / "release"
        if not args.report_only:
            stage.model = WorldModel.from_pretrained(str(release), device=ranks.device)  # what is reported is what is released
        figures = report(stage, folder)
        (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(figures, indent=2), flush=True)
        if args.report_only:
            return
        write_starts(data, release, args.start_trials)
        if figures:
            flat = {f"world/{part}_{name}": value for part, values in figures.items() if isinstance(values, dict) for name, value in values.items()}
            tracker.log(args.video_iterations, flat)
        size = sum(file.stat().st_size for file in release.iterdir()) / 1e6
        print(f"the world model is in {release} ({size:.1f} MB with its start states): EvacVectorEnv(model={str(release)!r})", flush=True)

    distributed.on_rank0(finish)
    tracker.close()
    distributed.cleanup()


if __name__ == "__main__":
    main(arguments(Args, __doc__))
