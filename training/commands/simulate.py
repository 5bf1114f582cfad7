"""`galembed simulate`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--bricks", default=1, show_default=True, help="Survey bricks.")
@click.option("--brick-size", default=3600, show_default=True, help="Pixels on a brick's side; 3600 in the surveys.")
@click.option("--sources", "sources_per_brick", default=500, show_default=True, help="Catalogued sources a brick.")
@click.option("--cutouts", default=300, show_default=True, help="Other galaxies, as cutout cubes with votes.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same pixels.")
@click.option("--noise-seed", type=int, help="Same galaxies, other noise.")
@click.option("--workers", type=int, help="Processes; all cores unless given.")
def simulate(
    out: Path,
    bricks: int,
    brick_size: int,
    sources_per_brick: int,
    cutouts: int,
    seed: int,
    noise_seed: int | None,
    workers: int | None,
) -> None:
    """Simulate a small survey in OUT: bricks in the Legacy Surveys' layout, cutouts, catalogue and votes."""
    from galembed.progress import stages
    from training.simulation import simulate_survey

    with stages() as show:
        files = simulate_survey(
            out,
            bricks=bricks,
            brick_size=brick_size,
            sources_per_brick=sources_per_brick,
            cutouts=cutouts,
            seed=seed,
            noise_seed=noise_seed,
            workers=workers,
            progress=show,
        )
    click.echo(str(files))
