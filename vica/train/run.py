"""Runs training, from arguments to a saved model."""

import logging
import os
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.data import IterableDataset

from ..data.collate import Collator
from ..data.samples import Samples, Stream, open_samples
from ..data.skipped import Skipped, forget_repaired
from ..data.training import TrainingSet, TrainingStream, check_folder
from ..plan.sizes import visual_tokens
from ..utils.errors import ViCAError
from ..utils.files import held, room_needed
from ..utils.program import LEVELS, exit_status, quiet_transformers
from . import curve, saving
from .arguments import one_line_complaints, parse
from .build import build, loading_dtype, widen
from .lora import add_adapters
from .meter import Meter, peak_flops
from .resume import resume_point
from .stages import Trained, describe, freeze
from .trainer import ViCATrainer

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    return exit_status(
        "vica train", lambda: train(argv), "stopped; started again it goes on from its newest checkpoint"
    )


def train(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse(argv)
    output = Path(args.output_dir)
    with held(output, "give this one another --output_dir") if args.should_save else nullcontext():
        trained = Trained.of(args)
        if args.should_save:
            saving.check_output(output, model_args.model_name_or_path, trained)
        prepare(args)
        run(model_args, data_args, args, trained)


def run(model_args, data_args, args, trained: Trained) -> None:
    records = open_records(data_args, args)
    model, processor = build(model_args, data_args, args)
    if trained.adapters:
        with one_line_complaints():
            model = add_adapters(model, args)
    freeze(model, trained)
    widen(model, args)
    config = model.get_base_model().config if trained.adapters else model.config
    samples = training_set(records, data_args, args, processor, config)
    total = None if isinstance(samples, IterableDataset) else len(samples)
    if args.should_save:
        announce(args, model, total)
    point = resume_point(args, config, trained)
    report = Path(args.output_dir) / "skipped.jsonl"
    if not data_args.streaming:
        with args.main_process_first(local=False):
            if args.should_save:
                forget_repaired(report, samples)
    with one_line_complaints():
        trainer = ViCATrainer(
            model=model,
            args=args,
            train_dataset=samples,
            data_collator=Collator(processor.pad_id),
            processing_class=processor,
            trained=trained,
            meter=Meter(config, trained, peak_flops(args.peak_tflops, args.device)),
            skipped=Skipped(report, data_args.max_broken_share, total),
        )
    if point is not None and args.should_save:
        print(f"goes on from {point}", flush=True)
    trainer.train(resume_from_checkpoint=point)
    finish(trainer)


def prepare(args) -> None:
    """Settles everything that must be known before anything large is loaded."""
    quiet_transformers()
    logging.basicConfig(level=logging.INFO if args.should_save else logging.ERROR, format="%(message)s")
    if args.log_level in LEVELS:  # transformers' own flag
        logging.getLogger("vica").setLevel(args.log_level.upper())
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)  # needed on every machine
    if args.should_save:
        saving.clear_unfinished(args.output_dir)
    check_optimizer(args)
    join_ranks(args)
    if "wandb" in args.report_to:
        stay_offline_without_key(args.output_dir)


def check_optimizer(args) -> None:
    """Refuses a projector rate beside an optimizer that a DeepSpeed file names: DeepSpeed builds that one with all
    parameters in one group, at one rate."""
    plugin = args.deepspeed_plugin
    if args.mm_projector_lr is not None and plugin is not None and "optimizer" in plugin.hf_ds_config.config:
        raise ViCAError("--mm_projector_lr is lost on the optimizer that --deepspeed names: take it out there")


def join_ranks(args) -> None:
    """Joins the process group before the model is built: ZeRO-3 shards the model while it loads, and without the group
    it would assume one process."""
    if args.device and args.deepspeed_plugin is not None:
        import deepspeed

        try:
            deepspeed.init_distributed()
        except ImportError as error:  # without a launcher's variables DeepSpeed looks for MPI
            raise ViCAError(
                "--deepspeed wants a launcher, be it for one process: torchrun --nproc_per_node 1 -m vica.train"
            ) from error


def stay_offline_without_key(folder: str) -> None:
    os.environ.setdefault("WANDB_DIR", folder)
    known = os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()
    if not known and "WANDB_MODE" not in os.environ:
        log.warning("no WANDB_API_KEY: wandb writes to %s only (wandb sync sends it later)", folder)
        os.environ["WANDB_MODE"] = "offline"


def open_records(data_args, args) -> Samples | Stream:
    if data_args.streaming and args.max_steps <= 0:
        raise ViCAError("--streaming has no known length: give --max_steps")
    check_folder(data_args.image_folder)
    return open_samples(data_args.data_path, data_args.streaming)


def training_set(records: Samples | Stream, data_args, args, processor, config):
    options = dict(
        image_folder=data_args.image_folder,
        template=config.conversation,
        max_length=args.model_max_length,
        visual_tokens=visual_tokens(config),
    )
    if not data_args.streaming:
        return TrainingSet(records, processor, **options)
    return TrainingStream(records, processor, seed=args.order_seed, endless=True, **options)


def announce(args, model, total: int | None) -> None:
    print(f"stage {args.stage}\n{describe(model)}")
    steps = "" if total is None else f", {total:,} samples"
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    print(f"batch {batch} ({args.world_size} processes){steps}; into {args.output_dir}", flush=True)


def finish(trainer: ViCATrainer) -> None:
    """Saves the model in the precision of its use, the log and the plot of the loss."""
    args, output = trainer.args, Path(trainer.args.output_dir)
    trainer.check_last_loss()
    if trainer.state.global_step == 0:
        raise ViCAError("no step was taken: the data are fewer than a batch, or no epoch was asked for")
    staging = output / saving.UNFINISHED
    if trainer.trained.whole:
        trainer.model.to(loading_dtype(args))
    with room_needed(staging):
        trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        trainer.state.save_to_json(str(staging / "trainer_state.json"))
        saving.publish_files(staging, output)
        curve.plot(output / "loss.png", trainer.state.log_history)
        if trainer.skipped.count:
            print(f"{trainer.skipped.count} samples were left out; {trainer.skipped.file} says why")
        print(f"wrote {output}", flush=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
    if torch.distributed.is_initialized():
        # DDP's reducer holds the process group. If it held the last reference, it would end the group while it holds
        # Python's lock; a gloo thread that has to be joined may wait for that lock, and the process would never end.
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
        torch.distributed.destroy_process_group()
