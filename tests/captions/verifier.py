"""The official rules of Ideogram 4 captions, checked on the JSON text; shares no code with ideoflow.

Written from the published rules, on the serialised caption rather than on data, so that separators, key
order and letter case are seen as the model sees them. ``verify`` returns what is wrong, in words.
"""

import json

HEX = set("0123456789ABCDEF")


class Pairs(list):
    """A JSON object as the list of its (key, value) pairs: order and repetition stay visible."""

    def keys(self):
        return [k for k, _ in self]

    def get(self, key):
        return next((v for k, v in self if k == key), None)


def verify(text):
    wrong = []
    try:
        root = json.loads(text, object_pairs_hook=Pairs, parse_constant=lambda c: wrong.append(c))
    except ValueError as error:
        return [f"not JSON: {error}"]
    if not isinstance(root, Pairs):
        return ["not an object"]
    if "\n" in text or "\r" in text:
        wrong.append("more than one line")
    if json.dumps(plain(root), separators=(",", ":"), ensure_ascii=False) != text:
        wrong.append("not serialised compactly")
    order(
        wrong,
        "root",
        root,
        ["high_level_description", "style_description", "compositional_deconstruction"],
        ["compositional_deconstruction"],
    )
    if "high_level_description" in root.keys():  # noqa: SIM118
        string(wrong, "high_level_description", root.get("high_level_description"))
    if "style_description" in root.keys():  # noqa: SIM118
        style(wrong, root.get("style_description"))
    composition = root.get("compositional_deconstruction")
    if not isinstance(composition, Pairs):
        return [*wrong, "composition is no object"]
    order(wrong, "composition", composition, ["background", "elements"], ["background", "elements"])
    string(wrong, "background", composition.get("background"))
    elements = composition.get("elements")
    if not isinstance(elements, list) or isinstance(elements, Pairs):
        return [*wrong, "elements is no list"]
    for item in elements:
        element(wrong, item)
    return wrong


def plain(value):
    if isinstance(value, Pairs):
        return {k: plain(v) for k, v in value}
    return [plain(v) for v in value] if isinstance(value, list) else value


def order(wrong, name, pairs, allowed, required):
    keys = pairs.keys()
    if len(set(keys)) != len(keys):
        wrong.append(f"{name}: a key twice")
    for key in keys:
        if key not in allowed:
            wrong.append(f"{name}: unknown key {key}")
    positions = [allowed.index(key) for key in keys if key in allowed]
    if positions != sorted(positions):
        wrong.append(f"{name}: keys out of order")
    for key in required:
        if key not in keys:
            wrong.append(f"{name}: {key} is missing")


def string(wrong, name, value):
    if not isinstance(value, str):
        wrong.append(f"{name} is no string")
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        wrong.append(f"{name} is no UTF-8")


def style(wrong, value):
    if not isinstance(value, Pairs):
        wrong.append("style is no object")
        return
    keys = value.keys()
    if ("photo" in keys) == ("art_style" in keys):
        wrong.append("not exactly one of photo and art_style")
        return
    photo = ["aesthetics", "lighting", "photo", "medium"]
    art = ["aesthetics", "lighting", "medium", "art_style"]
    names = photo if "photo" in keys else art
    order(wrong, "style", value, [*names, "color_palette"], names)
    for name in names:
        string(wrong, name, value.get(name))
    if "color_palette" in keys:
        palette(wrong, value.get("color_palette"), 16)


def element(wrong, value):
    if not isinstance(value, Pairs):
        wrong.append("element is no object")
        return
    kind = value.get("type")
    if kind == "obj":
        order(wrong, "obj", value, ["type", "bbox", "desc", "color_palette"], ["type", "desc"])
    elif kind == "text":
        order(
            wrong, "text", value, ["type", "bbox", "text", "desc", "color_palette"], ["type", "text", "desc"]
        )
        string(wrong, "text", value.get("text"))
    else:
        wrong.append("type is neither obj nor text")
        return
    string(wrong, "desc", value.get("desc"))
    if "bbox" in value.keys():  # noqa: SIM118
        box = value.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(type(v) is int for v in box)):
            wrong.append("bbox is not four integers")
        else:
            y_min, x_min, y_max, x_max = box
            if min(box) < 0 or max(box) > 1000 or y_min > y_max or x_min > x_max:
                wrong.append("bbox out of range or reversed")
    if "color_palette" in value.keys():  # noqa: SIM118
        palette(wrong, value.get("color_palette"), 5)


def palette(wrong, value, most):
    if not isinstance(value, list) or isinstance(value, Pairs) or len(value) > most:
        wrong.append("palette is no list, or too long")
        return
    for colour in value:
        if not (isinstance(colour, str) and len(colour) == 7 and colour[0] == "#" and set(colour[1:]) <= HEX):
            wrong.append(f"not a colour: {colour!r}")
