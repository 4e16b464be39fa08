"""The log of a training run: log.jsonl, choices.jsonl, skipped.jsonl, and the progress bar."""

import contextlib
import math
import time

from evaluate import UserError, plural
from support.checkpoint import write_pointer
from support.console import WITHOUT_RATE, progress, writing
from support.jsonl import JsonlWriter
from support.screen import bar_text, say_evaluation, say_steps

# Lines with this field are remembered; of choices.jsonl, which may exceed the memory, none.
REMEMBERED = {"log.jsonl": "valid", "skipped.jsonl": "id", "choices.jsonl": None}
NO_ROOM = "the last checkpoint is kept: make room and continue with --resume"


class TrainingLog:
    """Logs every step and evaluation of a run; a resumed run's log goes on after `step`.

    What a step did is summed on the device until its end. Rank 0 alone writes and shows.
    """

    def __init__(self, args, folder, step, total, posts, ranks):
        self.args, self.folder, self.ranks, self.most_skipped = args, folder, ranks, posts // 100
        self.evaluated, self.best = 0, (-1.0, 0)  # last evaluation's step; best F1@1 and its step
        self.one_pass = args.gradient_checkpointing or ranks.engine == "fsdp"  # as the step does
        self.choices = []
        self.writers, self.board, self.sums = {}, None, None
        kept = ranks.from_rank0(self.open_files, step)
        self.skipped = {line["id"] for line in kept["skipped.jsonl"]}
        for line in kept["log.jsonl"]:
            self.remember(line)
        if args.tensorboard:
            self.board = ranks.on_rank0(tensorboard_writer(), str(folder), purge_step=step + 1)
        self.epoch_steps = math.ceil(posts / args.batch_size)
        if ranks.rank == 0:
            say_steps(args, folder, step, total)
        options = {"initial": step, "bar_format": WITHOUT_RATE, "disable": ranks.rank > 0}
        self.bar = progress(None, total, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        for writer in self.writers.values():
            with contextlib.suppress(OSError):  # a full disk was reported when it was met
                writer.close()
        if self.board:
            self.board.close()

    def open_files(self, step):
        """Open the files and drop what is after `step`; returns {name: lines to remember}."""
        kept = {}
        for name in REMEMBERED:
            writer = JsonlWriter(self.folder / name)
            lines = (line for _, _, line in writer.read(lambda line: line["step"] <= step))
            kept[name] = [line for line in lines if REMEMBERED[name] in line]
            if name != "choices.jsonl" or self.args.log_choices or writer.path.exists():
                with writing(writer.path, NO_ROOM):
                    writer.open()
                self.writers[name] = writer
        return kept

    def write(self, name, *lines):
        """Append lines to one of the files. Raises UserError where the disk is full."""
        if self.ranks.rank == 0:
            with writing(self.folder / name, NO_ROOM):
                self.writers[name].append(*lines)

    def start_step(self, waited):
        """Start the step's clock; it has waited `waited` seconds for its data before."""
        self.waited, self.started = waited, time.perf_counter() - waited

    def add(self, batch, loss, plain_loss, use_cot):
        """Add one micro-batch's per-sample losses and choices (B,)."""
        import torch

        count = len(batch)
        plain = torch.full_like(loss, math.nan) if plain_loss is None else plain_loss
        cot_tokens, plain_tokens = (x.mask[:count].sum(1) for x in (batch.cot, batch.plain))
        chosen = torch.where(use_cot, cot_tokens, plain_tokens)
        answers = [chosen] if self.one_pass else [chosen * use_cot, chosen * ~use_cot]
        if self.args.mode == "multitask":
            answers = [plain_tokens, cot_tokens]
        prompts = batch.prompt["attention_mask"][:count]
        values = {
            "samples": count,
            "loss": loss.detach().sum(),
            "plain_loss": plain.detach().sum(),
            "use_cot": use_cot.sum(),
            "truncated": batch.truncated,
            "tokens": prompts.sum() + sum(lengths.sum() for lengths in answers),
            "image_tokens": batch.prompt["mm_token_type_ids"][:count].sum(),
            # Tokens and padding.
            "places": prompts.numel()
            + sum(lengths.count_nonzero() * lengths.max() for lengths in answers if count),
        }
        # One tensor that stays on the device: to read a value would wait for the GPU.
        values = {name: torch.as_tensor(x, device=loss.device) for name, x in values.items()}
        self.names, sums = list(values), torch.stack([*values.values()]).double()
        self.sums = sums if self.sums is None else self.sums + sums
        if self.args.log_choices:
            self.choices.append((batch.ids, plain, use_cot))

    def end_step(self, step, epoch, lr, norm, skipped):
        """Write the step's line. Raises UserError once more than 1% of the posts were skipped."""
        sums = {"samples": 0}
        if self.sums is not None:  # one rank has no micro-batch where no image can be read
            sums = dict(zip(self.names, self.ranks.all_reduce(self.sums).tolist(), strict=True))
        if samples := sums["samples"]:
            tokens, places = sums["tokens"], sums["places"]
            seconds = time.perf_counter() - self.started
            line = {
                "step": step,
                "epoch": epoch,
                "loss": sums["loss"] / samples,
                "cot_share": sums["use_cot"] / samples,
                "plain_loss": number_or_none(sums["plain_loss"] / samples),
                "lr": lr,
                "grad_norm": norm.item(),
                "samples": int(samples),
                "tokens": int(tokens),
                "padding": round((places - tokens) / (places - sums["image_tokens"]), 4),
                "seconds": round(seconds, 3),
                "waited": round(self.waited, 3),
            }
            if sums["truncated"]:
                line["truncated"] = int(sums["truncated"])
            self.write("log.jsonl", line)
            self.write_choices(step)
            self.write_scalars(step, line)
            text = bar_text(line["loss"], line["cot_share"], tokens / seconds)
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        self.sums = None
        if self.ranks.any(skipped):
            self.add_skipped(step, self.ranks.all_gather(skipped))

    def write_choices(self, step):
        """Write a line a sample to choices.jsonl; the values leave the device together."""
        import torch

        if not self.args.log_choices:
            return
        ids, plain_loss, use_cot = zip(*self.choices, strict=True)
        rows = torch.stack([torch.cat(plain_loss), torch.cat(use_cot).float()]).tolist()
        lines = []
        for identity, loss, reasoned in zip(sum(ids, []), *rows, strict=True):
            loss = number_or_none(round(loss, 6))
            line = {"step": step, "id": identity, "plain_loss": loss, "reasons": bool(reasoned)}
            lines.append(line)
        self.write("choices.jsonl", *self.ranks.all_gather(lines))
        self.choices = []

    def write_scalars(self, step, values, prefix="train"):
        """Write numbers for TensorBoard, if it was asked for."""
        if self.board:
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self.board.add_scalar(f"{prefix}/{name}", value, step)

    def add_skipped(self, step, skipped):
        """List posts whose image could not be read. Raises UserError once they are more than 1%."""
        for post in skipped:
            self.skipped.add(post.id)
            line = {"step": step, "id": post.id, "image": post.image, "reason": post.reason}
            self.write("skipped.jsonl", line)
        if len(self.skipped) > self.most_skipped:
            raise self.ranks.error(
                f"{plural(len(self.skipped), 'image')} could not be read, more than 1% of the "
                f"training posts; they are listed in {self.folder / 'skipped.jsonl'}, the last: "
                f"{post.image} (id {post.id}): {post.reason}"
            )

    def add_evaluation(self, step, scores):
        """Write an evaluation's line, and let `best` name the best checkpoint; scores: rank 0's."""
        if scores:
            line = {"step": step, "valid": scores}
            self.write("log.jsonl", line)
            self.remember(line)
            say_evaluation(step / self.epoch_steps, step, scores, best=self.best[1] == step)
            for name, values in scores.items():
                if isinstance(values, dict):
                    self.write_scalars(step, values, f"valid/{name}")

    def remember(self, line):
        """Remember a line of the log that is an evaluation."""
        self.evaluated = line["step"]
        f1 = line["valid"]["all"]["F1@1"]
        if f1 > self.best[0]:
            self.best = f1, line["step"]
        best = f"step-{self.best[1]}"
        if self.ranks.rank == 0 and (self.folder / best).is_dir():
            write_pointer(self.folder, "best", best)


def number_or_none(value):
    return None if math.isnan(value) else value


def tensorboard_writer():
    """TensorBoard's SummaryWriter. Raises UserError where the optional package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs one more package: pip install tensorboard") from None
    return SummaryWriter
