"""SimpleTuner's data loader: what becomes of each data backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ideoflow.recipe.importers.draft import Draft, Row
from ideoflow.recipe.sources import on_grid, side_of

# SimpleTuner draws new crops each epoch and encodes them again; here a few are drawn and kept.
RANDOM_CROPS = 4


class DataBackend:
    """One data backend on its way to a [[data.source]]."""

    def __init__(self, draft: Draft, backend: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        self.draft = draft
        self.backend: dict[str, Any] = {**shared, **backend}
        self.id = str(backend.get("id", "a source"))
        self.made: dict[str, Any] = {"name": self.id}

    def _get(self, key: str, default: Any = None) -> Any:
        return self.backend.get(key, default)

    def make(self) -> dict[str, Any] | None:
        """The table; None where there is nothing to train on."""
        images = self._images()
        if images is None:
            return None
        self.made["images"] = images
        self._captions()
        self._sizes()
        self._crop()
        if self._get("repeats"):
            self.made["repeats"] = int(self._get("repeats")) + 1
        if self._get("probability") is not None:
            self.made["weight"] = float(self._get("probability"))
        if self._get("max_upscale_threshold") is not None:
            self.made["upscale_limit"] = 1 + float(self._get("max_upscale_threshold"))
        own = {k: v for k, v in self.backend.items() if k not in ("huggingface", "parquet")}
        self.draft.take(LOADER, own, f"{self.id}: ")
        return self.made

    def _lost(self, key: str, value: Any, why: str) -> None:
        self.draft.lost(key, value, why, f"{self.id}: ")

    def _images(self) -> str | None:
        kind = self._get("type", "local")
        if kind == "huggingface":
            name, revision = self._get("dataset_name", ""), self._get("revision")
            if (split := self._get("split", "train")) != "train":
                self._lost("split", split, "name its files: images = 'hf://datasets/OWNER/NAME/data/SPLIT-*'")
            return f"hf://datasets/{name}" + (f"@{revision}" if revision else "")
        if kind != "local":
            self._lost("type", kind, "pictures have to be on this disk or on the hub: the source is left out")
            return None
        if self._get("caption_strategy") == "parquet" and (table := self._get("parquet", {}).get("path")):
            if pictures := self._get("instance_data_dir"):
                self.made["image_folder"] = self.draft.path(str(pictures))
            return self.draft.path(str(table))
        return self.draft.path(str(self._get("instance_data_dir", ".")))

    def _captions(self) -> None:
        strategy = self._get("caption_strategy", "filename")
        prompt = self._get("instance_prompt")
        if self._get("only_instance_prompt") and prompt:
            strategy = "instanceprompt"
        ways = {
            "textfile": "sidecar", "instanceprompt": "instance", "filename": "filename", "parquet": "column",
            "huggingface": "column",
        }  # fmt: skip
        if strategy not in ways:
            self._lost(
                "caption_strategy", strategy, "set caption = 'sidecar', 'column', 'filename' or 'instance'"
            )
        self.made["caption"] = ways.get(strategy, "auto")
        if self.made["caption"] == "instance":
            self.made["instance_prompt"] = prompt or ""
        elif prompt and self._get("prepend_instance_prompt"):
            why = "words before a caption's JSON break it: write <token> into the captions, and fill it in " \
                  "with captions.placeholders"  # fmt: skip
            self._lost("instance_prompt", prompt, why)
        columns = {**self._get("parquet", {}), **self._get("huggingface", {})}
        caption = self._get("caption_column") or columns.get("caption_column")
        if isinstance(caption, list):
            self._lost("caption_column", caption[1:], "one column, which may hold a list of captions")
            caption = caption[0] if caption else None
        if caption and self.made["caption"] == "column":
            self.made["caption_column"] = caption
        if image := self._get("image_column") or columns.get("filename_column"):
            self.made["image_column"] = image
        for key in columns:
            if key not in ("path", "caption_column", "filename_column", "width_column", "height_column",
                           "identifier_includes_extension"):  # fmt: skip
                self._lost(key, columns[key], "not a part of a recipe")

    def _sizes(self) -> None:
        kind = self._get("resolution_type", "pixel_area")
        area = kind == "area"

        def side(value: Any) -> float:
            return side_of(float(value)) if area else float(value)

        resolution = self._get("resolution", 1.0 if area else 1024)
        self.made["resolution"] = on_grid(side(resolution))
        if kind == "pixel":
            self.made["resolution_type"] = "pixel"
        if self.made["resolution"] != side(resolution):
            what = f"{self.id}: resolution {resolution} becomes {self.made['resolution']}, on the grid of 16"
            self.draft.say("resolution", what)
        for key in ("minimum_image_size", "maximum_image_size", "target_downsample_size"):
            if self._get(key):
                self.made[key] = round(side(self._get(key)))

    def _crop(self) -> None:
        if not self._get("crop", False):
            self.made["crop"] = "off"
            for key in ("maximum_image_size", "target_downsample_size"):
                self.made.pop(key, None)  # they are about what is cut out
            return
        style = self._get("crop_style", "random")
        if style == "face":
            self.draft.say(
                "crop_style", f"{self.id}: crop_style = 'face' becomes 'center': faces are not looked for"
            )
            style = "center"
        self.made["crop"] = style
        self.made["aspect"] = aspect = self._get("crop_aspect", "square")
        if buckets := self._get("crop_aspect_buckets"):
            plain = [b["aspect_bucket"] if isinstance(b, dict) else b for b in buckets]
            self.made["aspects"] = [float(b) for b in plain]
        if style == "random" or aspect == "random":
            self.made["crop_variants"] = RANDOM_CROPS


LOADER: tuple[Row, ...] = (
    Row("id", "name", quiet=True),
    Row("type", "images", "`local` and `huggingface`; no S3, no lists of URLs", quiet=True),
    Row("dataset_type", "", "pictures; caches of embeddings have no table of their own", quiet=True),
    Row("disabled", "", "a disabled source is left out", quiet=True),
    Row("disable", "", "likewise", quiet=True),
    Row("instance_data_dir", "images", "with a table of captions, `image_folder`", quiet=True),
    Row("dataset_name", "images", "`hf://datasets/OWNER/NAME`", quiet=True),
    Row("split", "images", "the training split; name the files of another", quiet=True),
    Row("revision", "images", "`hf://datasets/OWNER/NAME@REVISION`", quiet=True),
    Row("crop", "crop", "false is `off`: the whole picture, stretched by less than half a token", quiet=True),
    Row("crop_style", "crop", "`random`, `center`, `corner`; `face` becomes `center`", quiet=True),
    Row("crop_aspect", "aspect", "`square`, `preserve`, `closest`, `random`", quiet=True),
    Row("crop_aspect_buckets", "aspects", "without weights", quiet=True),
    Row("resolution", "resolution", "rounded to 16 pixels", quiet=True),
    Row(
        "resolution_type",
        "resolution_type",
        "`pixel`, `pixel_area`; `area` becomes `pixel_area`, megapixels become pixels",
        quiet=True,
    ),
    Row("minimum_image_size", "minimum_image_size", quiet=True),
    Row("maximum_image_size", "maximum_image_size", quiet=True),
    Row("target_downsample_size", "target_downsample_size", quiet=True),
    Row(
        "max_upscale_threshold",
        "upscale_limit",
        "0.2 is 1.2; larger ones are reported, not left out",
        quiet=True,
    ),
    Row("minimum_aspect_ratio", "", "no picture is left out for its aspect"),
    Row("maximum_aspect_ratio", "", "no picture is left out for its aspect"),
    Row(
        "caption_strategy",
        "caption",
        "`textfile` is `sidecar`, `instanceprompt` is `instance`, `parquet` and `huggingface` are `column`",
        quiet=True,
    ),
    Row("instance_prompt", "instance_prompt", quiet=True),
    Row("only_instance_prompt", "caption", "true is `instance`", quiet=True),
    Row(
        "prepend_instance_prompt",
        "captions.placeholders",
        "never in front of JSON: fill in `<token>`",
        quiet=True,
    ),
    Row("caption_column", "caption_column", quiet=True),
    Row("image_column", "image_column", quiet=True),
    Row("parquet", "images, image_column, caption_column", "the table is the source", quiet=True),
    Row("huggingface", "caption_column", "", quiet=True),
    Row("disable_multiline_split", "", "a text file is one caption, whatever its lines", quiet=True),
    Row("caption_shuffle", "captions.shuffle", "elements are shuffled, for all sources alike"),
    Row("metadata_backend", "", "sizes are read from the pictures' headers, once", quiet=True),
    Row("metadata_update_interval", "", "the data set is read when a run starts", quiet=True),
    Row("repeats", "repeats", "one more: 0 there is 1 here; nothing for a single source", quiet=True),
    Row("probability", "weight", quiet=True),
    Row("max_num_samples", "", "put fewer pictures into a folder of their own"),
    Row("start_epoch", "", "every source is trained from the first step to the last"),
    Row("start_step", "", "every source is trained from the first step to the last"),
    Row("end_epoch", "", "every source is trained from the first step to the last"),
    Row("end_step", "", "every source is trained from the first step to the last"),
    Row("is_regularisation_data", "", "no teacher is kept"),
    Row("is_regularization_data", "", "no teacher is kept"),
    Row("slider_strength", "", "no sliders"),
    Row("timestep_sampling_offset", "", "one density of noise levels for all: train.schedule"),
    Row("conditioning", "", "no conditioning pictures"),
    Row("conditioning_data", "", "no conditioning pictures"),
    Row("cache_dir_vae", "cache.folder", "one cache for everything, by content", quiet=True),
    Row("cache_dir", "cache.folder", "one cache for everything, by content", quiet=True),
    Row("default", "", "see cache_dir", quiet=True),
    Row("text_embeds", "", "see cache_dir", quiet=True),
    Row("image_embeds", "", "see cache_dir", quiet=True),
    Row("write_batch_size", "", "see cache_dir", quiet=True),
    Row(
        "vae_cache_clear_each_epoch",
        "crop_variants",
        f"{RANDOM_CROPS} crops of each picture are kept",
        quiet=True,
    ),
    Row("vae_cache_ondemand", "", "everything is encoded before training", quiet=True),
    Row("vae_cache_disable", "", "everything is encoded before training", quiet=True),
    Row("preserve_data_backend_cache", "", "caches are kept by content", quiet=True),
    Row("skip_file_discovery", "", "what is known of unchanged files is kept", quiet=True),
    Row("hash_filenames", "", "caches are kept by content", quiet=True),
    Row("delete_unwanted_images", "", "no picture is ever deleted"),
    Row("delete_problematic_images", "", "no picture is ever deleted"),
    Row("delete_nsfw_images", "", "no picture is ever deleted"),
)
