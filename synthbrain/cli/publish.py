"""``synthbrain pack``, ``torrent``, ``publish`` and ``cite``: the maintainers' half."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthbrain.cli.console import examples, hint, interrupted, say
from synthbrain.cli.options import Cohort, DryRun, MadeBy, Selection, StoreFolder, selecting
from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from synthbrain.publish.layout import Built

_STYLES = ("bibtex", "cff", "text")
_VERSIONS = ("hybrid", "v1", "v2")

Rights = Annotated[
    str,
    typer.Option(metavar="TEXT", help="Your right to publish, where the licence is unknown: "
                 "'I hold the rights: …'. It is published too."),
]  # fmt: skip
Latents = Annotated[bool, typer.Option("--latents", metavar=" ", help="Also the stored latents.")]
Voxels = Annotated[
    bool,
    typer.Option("--voxels", metavar=" ",
                 help="Also Parquet files of voxels, for readers without synthbrain; as many "
                 "bytes again."),
]  # fmt: skip
StoredOnly = Annotated[
    bool, typer.Option("--stored-only", metavar=" ", help="Leave out rows that are not stored.")
]
Authors = Annotated[
    list[str] | None, typer.Option("--author", metavar="NAME", help="Author; may be repeated.")
]


@selecting
def pack(
    cohort: Cohort,
    selection: Selection,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    hub: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Where it will be published, for its addresses."),
    ] = None,
    rights: Rights = "",
    author: Authors = None,
    latents: Latents = False,
    voxels: Voxels = False,
    stored_only: StoredOnly = False,
    store: StoreFolder = None,
    made_by: MadeBy = None,
) -> None:  # fmt: skip
    """Make a folder of stored volumes that can be published as it is.

    One uncompressed zip for each block of 1000 volumes, the rows with their hashes, pictures, and
    cards. The same volumes give the same bytes; what is there already is kept.
    """
    options = {"rights": rights, "authors": author or (), "latents": latents, "voxels": voxels,
               "stored_only": stored_only, "repo_id": hub}  # fmt: skip
    built = _build(cohort, selection, out, store, made_by, options)
    print(built.folder)
    hint("synthbrain", "publish", str(built.folder), "--hub", hub or "ORG/NAME")


def torrent(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A file or folder.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The .torrent to write.", show_default="<PATH>.torrent"),
    ] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A tracker; may be repeated.")
    ] = None,
    web_seed: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Where the same file, or what the folder lies in, is on "
                     "a web server; may be repeated."),
    ] = None,
    piece_size: Annotated[
        int | None,
        typer.Option(metavar="KiB", help="Size of a piece, a power of two.",
                     show_default="small enough to fetch single volumes"),
    ] = None,
    version: Annotated[
        str,
        typer.Option(metavar="hybrid|v1|v2", help="Of the protocol. Hybrids serve both, but "
                     "Transmission 3.00 and aria2 1.36 do not understand them: v1 reaches all."),
    ] = "hybrid",
    comment: Annotated[str, typer.Option(metavar="TEXT", help="A comment.")] = "",
    private: Annotated[
        bool, typer.Option("--private", metavar=" ", help="Only its trackers may know of peers.")
    ] = False,
) -> None:  # fmt: skip
    """Make a torrent of a file or a folder.

    The same files and options give the same torrent.
    """
    from synthbrain.progress import measured
    from synthbrain.torrent.make import make_torrent

    if version not in _VERSIONS:
        raise UsageError(f"--version must be one of {', '.join(_VERSIONS)}; found {version!r}")
    out = out or path.with_name(f"{path.name}.torrent")
    size = _bytes(path)
    with measured("hashing", size) as show:
        meta = make_torrent(
            path, out, trackers=tracker or (), web_seeds=web_seed or (), comment=comment,
            piece_size=None if piece_size is None else piece_size * 1024, private=private,
            version=version,  # type: ignore[arg-type]
            progress=lambda done, total: show(done * size // max(total, 1), path.name),
        )  # fmt: skip
    say(f"{len(meta.files):,} files in pieces of {meta.piece_length // 1024:,} KiB")
    print(out)
    hint("synthbrain", "seed", str(out), "--folder", str(path.absolute().parent))


@selecting
def publish(
    ctx: typer.Context,
    cohort: Annotated[
        str,
        typer.Argument(metavar="COHORT", show_default=False,
                       help="A cohort whose volumes are stored, or a folder from `pack`."),
    ],
    selection: Selection,
    hub: Annotated[str, typer.Option(metavar="ORG/NAME", help="Dataset repository on the Hub.")],
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to make what is uploaded.",
                     show_default="publish/ in the package's home"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", metavar=" ", help="Make a new repository a private one.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to publish on.")
    ] = None,
    rights: Rights = "",
    author: Authors = None,
    latents: Latents = False,
    voxels: Voxels = False,
    stored_only: StoredOnly = False,
    store: StoreFolder = None,
    made_by: MadeBy = None,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Upload volumes, rows, pictures and cards to the Hugging Face Hub.

    Safe to interrupt and to run again: what is uploaded is kept, and a set is not seen before it
    is whole. Refused while the licence is unknown, unless --rights states yours.
    """
    from synthbrain.home import home
    from synthbrain.publish.folder import contents
    from synthbrain.publish.hub import publish as upload

    if (Path(cohort) / "packs").is_dir():
        if selection.given or any((folder, rights, author, latents, voxels, stored_only, store,
                                   made_by)):  # fmt: skip
            raise UsageError(
                f"{cohort} is a folder from `synthbrain pack` and is uploaded as it is; leave out "
                "what says what goes into it, or name the cohort"
            )
        ready = Path(cohort)
    else:
        options = {"rights": rights, "authors": author or (), "latents": latents,
                   "voxels": voxels, "stored_only": stored_only, "repo_id": hub}  # fmt: skip
        where = folder or home() / "publish" / hub.replace("/", "--")
        ready = _build(cohort, selection, where, store, made_by, options).folder
    files = [ready / path for path in contents(ready)]
    say(f"{len(files):,} files, {sum(p.stat().st_size for p in files) / 1e6:,.1f} MB for {hub}")
    if dry_run:
        return
    try:
        commit = upload(ready, hub, private=private, revision=revision)
    except KeyboardInterrupt:
        raise interrupted(ctx, "what is uploaded is kept") from None
    print(f"hf://datasets/{hub}@{commit}")
    hint("synthbrain", "pull", f"hf://datasets/{hub}")


def cite(
    manifest: Cohort,
    format: Annotated[
        str, typer.Option(metavar="bibtex|cff|text", help="How to print it.")
    ] = "bibtex",
) -> None:  # fmt: skip
    """Print how to cite a set of volumes and the work it rests on."""
    from synthbrain.manifest import Manifest
    from synthbrain.publish.citations import citations

    if format not in _STYLES:
        raise UsageError(f"--format must be one of {', '.join(_STYLES)}; found {format!r}")
    print(citations(Manifest.open(manifest), format).rstrip())  # type: ignore[arg-type]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        epilog=examples(
            "synthbrain pack older --out older-packs --author 'Ada Lovelace'",
            "synthbrain pack synthbrain-100k --split test --out test-packs --stored-only",
        )
    )(pack)
    app.command(
        epilog=examples(
            "synthbrain torrent LDM_100k.tar --tracker udp://tracker.example.org:6969",
            "synthbrain torrent LDM_100k.tar --web-seed https://host/LDM_100k.tar",
        )
    )(torrent)
    app.command(
        epilog=examples(
            "synthbrain publish older --hub ORG/NAME --dry-run",
            "synthbrain publish older --hub ORG/NAME",
            "synthbrain publish older-packs --hub ORG/NAME --private",
        )
    )(publish)
    app.command(epilog=examples("synthbrain cite ldm-100k", "synthbrain cite older --format text"))(
        cite
    )


def _build(
    cohort: str,
    selection: Selection,
    out: Path,
    store: Path | None,
    made_by: str | None,
    options: dict[str, Any],
) -> Built:
    from synthbrain.dataset import SynthBrainDataset
    from synthbrain.publish.layout import build

    dataset = SynthBrainDataset(
        cohort, generator=None, sources=[], store=store, made_by=made_by, **selection.keywords()
    )
    built = build(dataset, out, **options)
    say(f"{len(built.manifest):,} volumes, {built.size / 1e6:,.1f} MB in {built.folder}")
    return built


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
