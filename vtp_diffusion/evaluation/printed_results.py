"""Results of generated images as a table on the screen."""

from ..metrics.scores import SMALL_SPLIT
from .measurement import DECODED_FLOOR, DECODED_REFERENCE
from .report import copies_text

COPIED = "of these the numbers say nothing about a model"


def _deviation_text(deviation: float | None) -> str:
    return "" if deviation is None else f"± {deviation:7.2g}"


def _title(row: dict, protocol: str) -> str:
    return row["distance"] + f" ({protocol})" * (protocol != "own")


def print_singular(sizes: dict[str, tuple[int, int]]) -> None:
    """Print which Fréchet distances have too few images. Args: `sizes`: title -> numbers of images (of the smaller
    set) and of features."""
    few = [f"{title} ({n:,} images, {d:,} features)" for title, (n, d) in sizes.items() if n <= d]
    if few:
        print(
            f"no more images than features: {', '.join(few)}. Covariances are singular then, and distances biased: "
            "compare them only at the same number of images"
        )


def print_results(results: dict) -> None:
    """Print what `eval/generation.py` writes: a line for every distance, score and fault of the images."""
    protocol = results["protocol"]["name"]
    print(f"\nprotocol {protocol}" + ": " * (len(results["protocol"]) > 1), end="")
    print(", ".join(f"{key} {value}" for key, value in results["protocol"].items() if key != "name"))
    rows = results["distances"] + results["kernel_distances"]
    width = max((len(_title(row, protocol)) for row in rows), default=0)
    columns = f"{'images':10} {'N':>7} {'distance':>22}   {'at equal sizes':>22} {'real (floor)':>20}  sizes"
    print(f"\n{'':{width}} {columns}")
    for row in rows:
        floor, value = row["floor"], f"{row['value']:.4g} ± {row['spread']['value']:.2g}"
        print(f"{_title(row, protocol):{width}} {row['images']:10} {row['num_images']:7} {value:>22}   ", end="")
        if floor is None:
            held = "statistics only" if results["counts"]["reference"] is None else "too few images"
            print(f"no floor: the reference holds {held}")
            continue
        print(
            f"{floor['generated']:12.4g} {_deviation_text(floor['generated_deviation']):9} "
            f"{floor['real']:10.4g} {_deviation_text(floor['real_deviation']):9}  "
            f"{floor['sizes'][0]} against {floor['sizes'][1]} ({floor['kind']})"
        )
    sizes = {}
    for row in rows:
        if "num_features" in row:
            sets = {row["images"]: row["num_images"], "the reference": row["num_reference"] or row["num_images"]}
            fewest = min(sets, key=sets.get)
            sizes[f"{row['distance']} of {fewest}"] = sets[fewest], row["num_features"]
    print_singular(sizes)
    for name, row in {row["images"]: row for row in results["distances"] if "active_parameters" in row}.items():
        flops = "an unknown number of" if row["flops_per_image"] is None else f"{row['flops_per_image']:.4g}"
        print(f"{name}: {flops} FLOPs an image, {row['active_parameters'] / 1e6:.4g} M active parameters a token")
    for row in results["scores"]:
        spread = f" ± {row['spread']['value']:.3g}" if "spread" in row else ""
        print(f"{row['score']:26} {row['images']:10} {row['num_images']:7} {row['value']:10.4f}{spread}")
        if row.get("images_per_split", SMALL_SPLIT) < SMALL_SPLIT:
            print(
                f"  its {row['splits']} parts hold {row['images_per_split']} images each, and no score exceeds that "
                "number: compare it only with scores of parts of this size (papers: 5,000)"
            )
        if "adm_value" in row:
            print(f"  in the order of the files, as ADM's evaluator takes them: {row['adm_value']:.4f}")
    _print_judges(results)
    if results["settings"]["feature_mode"] != "exact":
        print("features were computed in float16: for numbers to publish use --feature_mode exact")
    for row in results["not_measured"]:
        print(f"not measured: {row['what']} of {row['images']} on {row['network']}: {row['why']}")
    for name, number in results["duplicates"].items():
        if number:
            print(f"{name}: images that equal an earlier one: {number}")
    print_faults(results["skipped"], results["enlarged"])
    for images, shared in results["shared_images"].items():
        for name, number in shared.items():
            if number:
                part = "" if number == results["counts"][images] else f"{number} of "
                print(f"{part}the {images} images are those of the {name}, pixel for pixel: {COPIED}")
    for name, modes in results["converted"].items():
        print(f"{name}: converted to 8-bit RGB: {', '.join(f'{n} of mode {mode}' for mode, n in modes.items())}")
    if "near_duplicates" in results:
        found = results["near_duplicates"]
        print(f"near-duplicates in the reference (cosine distance below {found['threshold']:.4f}):")
        for name in ("generated", "control", "floor", DECODED_FLOOR, DECODED_REFERENCE, "reference"):
            if name in found:
                entry = found[name]
                print(f"{name:18} {entry['near_duplicates']} of {entry['num_images']} ({entry['share']:.1%})")


def _print_judges(results: dict) -> None:
    found = results.get("fdr6", {})
    for name, row in found.items():
        if name != "constants_from":
            value = f"{row['value']:.4g} ± at most {row['spread_at_most']:.2g}"
            print(f"{'FDr6':12} {name:10} {row['num_images']:7} {value:>22}, the mean of")
            for network, value in row["distances"].items():
                constant, ratio = row["constants"][network], row["ratios"][network]
                print(f"  {network:16} {value:10.4g} / {constant:.4g} = {ratio:.4g}")
    if found:
        print(f"  constants of FDr6: {found['constants_from']}")
    for row in results.get("memorisation", []):
        print(
            f"memorised on {row['network']:14} {row['images']:10} {row['num_images']:7} {row['share']:.1%} "
            f"(held-out images: {row['quantile']:.0%}; {row['num_training']} training images; {copies_text(row)})"
        )


def print_faults(skipped: dict[str, list[str]], enlarged: dict[str, int]) -> None:
    """Print how many images of every set were left out or enlarged."""
    for name, keys in skipped.items():
        if keys:
            print(f"{name}: images that cannot be read, left out: {len(keys)} (the first is {keys[0]})")
    for name, count in enlarged.items():
        if count:
            print(f"{name}: images that are smaller than the measured size and were enlarged: {count}")
