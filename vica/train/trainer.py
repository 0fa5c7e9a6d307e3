"""transformers' Trainer with ViCA's batches, samplers, checkpoints and figures."""

import contextlib
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from ..data.grouping import LengthGroupedSampler
from ..data.skipped import Skipped
from ..utils.errors import ViCAError
from ..utils.files import room_needed
from ..utils.progress import counter
from . import saving
from .arguments import TrainArguments, one_line_complaints
from .meter import Meter
from .resume import write_run
from .stages import Trained, part_of

FOR_US = ("sample_ids", "broken")  # entries of a batch that the model does not take


class ProgressLines(ProgressCallback):
    """transformers' progress in lines, for a stderr that is no terminal; the log goes to stdout as ever."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = counter(state.max_steps, "steps")
        self.current_step = 0


class ViCATrainer(Trainer):
    args: TrainArguments
    model: nn.Module

    def __init__(self, *args, trained: Trained, meter: Meter, skipped: Skipped, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.args.disable_tqdm and not sys.stderr.isatty():
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressLines)
        self.trained, self.meter, self.skipped = trained, meter, skipped
        # before the model is sharded
        self.written = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if trained.adapters:  # a frozen projector may differ from the one in the base that the adapters are merged into
            self.written |= {name for name, _ in self.model.named_parameters() if part_of(name) == "projector"}
        self.unchecked: tuple | None = None  # the last loss, while it is copied from the device
        self.save_into = self.args.output_dir

    # --- data ---

    def get_train_dataloader(self) -> DataLoader:
        """Returns a loader that leaves ids, masks and labels on the host, where the model plans its call: on the device
        it would have to wait for them."""
        if isinstance(self.train_dataset, IterableDataset):  # the dataset deals samples to ranks and workers itself
            return DataLoader(
                self.train_dataset,
                batch_size=self._train_batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
        loader = super().get_train_dataloader()
        loader.device = None
        dealt = loader.batch_sampler
        if hasattr(dealt, "batch_sampler"):  # batches are dealt to several ranks
            # A resumed run puts a skipping sampler in front, in which accelerate finds no sampler to set the epoch on:
            # the rest of the epoch would come in the first epoch's order.
            dealt.sampler = dealt.batch_sampler.sampler
        return loader

    def _get_train_sampler(self, train_dataset=None):
        if not (self.args.group_by_modality_length or self.args.group_by_length):
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(
            self.train_dataset.lengths,
            batch_size=self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            by_modality=self.args.group_by_modality_length,
            seed=self.args.order_seed,
        )

    def _prepare_inputs(self, inputs: dict) -> dict:
        moved = {name: inputs[name] for name in inputs if name not in FOR_US}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(self.args.device, non_blocking=True)
        return moved

    # --- a step ---

    def get_batch_samples(self, *args, **kwargs):
        """Returns no batch for a finished run that is started again: transformers tests for the end only after a
        step."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.skipped.saw(len(inputs["sample_ids"]) + len(inputs["broken"]))
        for broken in inputs["broken"]:
            self.skipped.add(broken)
        self.meter.count(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.check_last_loss()
        self.unchecked = (*self.to_host(loss), self.state.global_step + 1, inputs["sample_ids"])
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, {**inputs, "skip_logits": True}, return_outputs, num_items_in_batch)

    def to_host(self, loss: torch.Tensor) -> tuple:
        if loss.device.type != "cuda":
            return loss.clone(), None
        copy = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return copy, event

    def check_last_loss(self) -> None:
        """Raises if the last loss is not finite. It runs a step late, so that the device is never waited for, but
        before any save."""
        if self.unchecked is None:
            return
        loss, event, step, samples = self.unchecked
        if event is not None:
            event.synchronize()
        if not torch.isfinite(loss):
            shown = ", ".join(samples[:32]) + (f" and {len(samples) - 32} more" if len(samples) > 32 else "")
            raise ViCAError(f"the loss is {loss.item()} at step {step} for the samples {shown}")
        self.unchecked = None

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            parameters: dict[tuple[bool, float | None], list[nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    own_rate = self.args.mm_projector_lr if part_of(name) == "projector" else None
                    parameters.setdefault((name in decayed, own_rate), []).append(parameter)
            with one_line_complaints():
                chosen, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
                groups = [self.group(decays, rate, some) for (decays, rate), some in parameters.items()]
                self.optimizer = chosen(groups, **settings)
        return self.optimizer

    def create_scheduler(self, *args, **kwargs):
        with one_line_complaints():
            return super().create_scheduler(*args, **kwargs)

    def group(self, decays: bool, own_rate: float | None, parameters: list) -> dict:
        rate = {} if own_rate is None else {"lr": own_rate}
        return {"params": parameters, "weight_decay": self.args.weight_decay if decays else 0.0, **rate}

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.read(self.args.world_size, self.summed)
        super().log(logs, start_time)

    def summed(self, counts: list[float]) -> list[float]:
        mine = torch.tensor(counts, dtype=torch.float32, device=self.args.device)
        return self.accelerator.reduce(mine, "sum").tolist()

    # --- checkpoints ---

    def _get_output_dir(self, trial=None) -> str:
        return self.save_into

    def _save_checkpoint(self, model, trial=None) -> None:
        self.check_last_loss()
        staging, name = Path(self.args.output_dir) / saving.UNFINISHED, f"checkpoint-{self.state.global_step}"
        self.save_into = str(staging)
        try:
            with room_needed(staging):
                super()._save_checkpoint(model, trial)
        finally:
            self.save_into = self.args.output_dir
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_run(staging / name, self.args, self.config, self.trained)
            saving.publish(staging / name, Path(self.args.output_dir) / name)
            saving.rotate(self.args.output_dir, self.args.save_total_limit)
            saving.clear_unfinished(self.args.output_dir)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.trained.whole:
            return super().save_model(output_dir, _internal_call)
        state = self.trained_state()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            saving.write_trained(folder, self.accelerator.unwrap_model(self.model), state, self.trained.adapters)
            self.processing_class.save_pretrained(folder)
            self.config.save_pretrained(folder)

    @property
    def config(self):
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model().config if self.trained.adapters else model.config

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Returns the trained weights, and the projector beside adapters, unsharded and on the CPU."""
        if self.is_fsdp_enabled:
            state = self.accelerator.get_state_dict(self.model)
            return {name: state[name] for name in state if name in self.written}
        written = {name: p for name, p in self.model.named_parameters() if name in self.written}
        with gathered(list(written.values())):
            return {name: p.detach().cpu().clone() for name, p in written.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if self.trained.whole or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saving.read_trained(Path(resume_from_checkpoint), self.model if model is None else model)


def gathered(parameters: list):
    """Returns a context in which the parameters are whole: ZeRO-3 keeps only a piece of each on every rank."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
