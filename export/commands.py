"""`galembed export`."""

from __future__ import annotations

import click

from galembed.errors import GalembedError
from galembed.options import quiet_option


@click.command()
@click.argument("backbone", default="builtin")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    help="Numbers to compute in; repeatable.  [default: fp32, with --trt fp16]",
)
@click.option("--verify", type=click.Path(), help="Compare on the cutouts of this; needed for fewer bits.")
@click.option("--catalogue", type=click.Path(), help="Sources of a survey given to --verify.")
@click.option("--calibrate", type=click.Path(), help="Cutouts for int8's ranges.  [default: others of --verify]")
@click.option("--calibrate-catalogue", type=click.Path(), help="Sources of a survey given to --calibrate.")
@click.option("--trt", is_flag=True, help="Build TensorRT plans instead of ONNX engines.")
@click.option("--sm", metavar="86,89,...", help="GPUs to build for, by compute capability.  [default: the one here]")
@quiet_option
def export(
    backbone: str,
    precisions: tuple[str, ...],
    verify: str | None,
    catalogue: str | None,
    calibrate: str | None,
    calibrate_catalogue: str | None,
    trt: bool,
    sm: str | None,
    quiet: bool,
) -> None:
    """Compile BACKBONE, compare what comes out with torch, and install it if they agree.

    Engines in fewer bits are proved on 1,000 cutouts of --verify, among 5,000 others. One that differs too much is
    made again with its most sensitive layers in float32 before it is given up.
    """
    from galembed.backbones import load_backbone

    if sm and not trt:
        raise click.UsageError("--sm says which GPUs --trt builds for; give --trt too")
    if trt and (verify or calibrate):
        raise click.UsageError("--trt proves on the backbone's own samples; leave --verify and --calibrate out")
    if calibrate and "int8" not in precisions:
        raise click.UsageError("--calibrate is for --precision int8; give that too, or leave it out")
    chosen = load_backbone(backbone)
    if trt:
        from export.tensorrt import export_tensorrt

        for precision in precisions or ("fp16",):
            for plan in export_tensorrt(chosen, precision=precision, sm=_capabilities(sm)):
                click.echo(str(plan))
        return
    from export.engines import export_engines
    from export.trials import CALIBRATION, IMAGES, gather
    from galembed.sources import open_source

    readers = [
        open_source(source, catalogue=table) if source else None
        for source, table in ((verify, catalogue), (calibrate, calibrate_catalogue))
    ]
    failed: list[GalembedError] = []
    fewest = IMAGES if set(precisions) - {"fp32"} else 1
    calibration = CALIBRATION if "int8" in precisions else 0
    with gather(chosen, *readers, fewest=fewest, calibration=calibration, quiet=quiet) as evidence:
        for precision in precisions or ("fp32",):
            try:
                for report in export_engines(chosen, precision, evidence, quiet=quiet):
                    click.echo(str(report))
            except GalembedError as error:
                failed.append(error)
    for fault in failed[:-1]:
        click.echo(f"Error: {fault}", err=True)
    if failed:
        raise failed[-1]


def _capabilities(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: write numbers such as 86,89", param_hint="--sm") from error
