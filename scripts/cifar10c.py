"""The fifteen corruptions of CIFAR-10-C, at five severities, for pictures in numpy arrays.

After Hendrycks and Dietterich (2019, "Benchmarking neural network robustness to common corruptions
and perturbations"), with the constants of their CIFAR version. No library serves: imagecorruptions
and its fork imagecorruptions-imaug have the constants for ImageNet alone, and need OpenCV and
scikit-image. The original differs in two things (and its files of pictures are other random draws):

- frost: the original lays photographs of ice over the picture, here it is a texture of needles;
- elastic: the affine map and the displacements are applied in one interpolation, not in two.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Pictures = NDArray[np.uint8]  # (N, H, W, 3)
Floats = NDArray[Any]  # float32, the same in [0, 1]; results may leave it and are clipped
Corruption = Callable[[Floats, Any, np.random.Generator], Floats]

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(pictures: Pictures, name: str, severity: int, rng: np.random.Generator) -> Pictures:
    """Corrupt pictures (N, H, W, 3) by one of `CORRUPTIONS`; each picture draws its own noise."""
    if name not in CORRUPTIONS:
        raise SystemExit(f"no corruption {name!r}: choose from {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise SystemExit(f"severity {severity} of {name}: choose from 1 to 5")
    function, constants = CORRUPTIONS[name]
    x = pictures.astype(np.float32) / 255
    return as_bytes(function(x, constants[severity - 1], rng))


def as_bytes(x: Floats) -> Pictures:
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


# --- noise -------------------------------------------------------------------------------------


def gaussian_noise(x: Floats, sigma: float, rng: np.random.Generator) -> Floats:
    return x + sigma * rng.standard_normal(x.shape, np.float32)


def shot_noise(x: Floats, photons: float, rng: np.random.Generator) -> Floats:
    """Draw how many photons arrive; a white pixel is the mean of so many."""
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def impulse_noise(x: Floats, share: float, rng: np.random.Generator) -> Floats:
    """Turn a share of all values black or white."""
    hit = rng.random(x.shape, np.float32) < share
    return np.where(hit, rng.integers(2, size=x.shape), x).astype(np.float32)


# --- blur --------------------------------------------------------------------------------------


def defocus_blur(x: Floats, lens: tuple[float, float], _rng: np.random.Generator) -> Floats:
    """Blur by a disk of a radius, its edge softened by a Gaussian."""
    radius, softness = lens
    side = np.arange(-3, 4)
    disk = (side[:, None] ** 2 + side**2 <= radius**2).astype(np.float32)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), softness, radius=1)
    return ndimage.convolve(x, kernel[None, :, :, None], mode="mirror")


def glass_blur(x: Floats, glass: tuple[float, int], rng: np.random.Generator) -> Floats:
    """Let pixels show a neighbour above or to the left, or themselves, between two soft blurs.

    The paper has pixels change places. Its program copies them, and that is what the pictures show.
    """
    sigma, rounds = glass
    x = blurred(x, sigma)
    n, height, width, _ = x.shape
    each, rows, columns = np.ogrid[:n, 2:height, 2:width]
    for _ in range(rounds):
        up, left = rng.integers(2, size=(2, n, height - 2, width - 2))
        x[:, 2:, 2:] = x[each, rows - up, columns - left]
    return blurred(x, sigma)


def motion_blur(x: Floats, motion: tuple[int, float], rng: np.random.Generator) -> Floats:
    radius, sigma = motion
    return smeared(x, radius, sigma, rng.uniform(-45, 45, len(x)))


def zoom_blur(x: Floats, steps: int, _rng: np.random.Generator) -> Floats:
    """Average the picture and its enlargements by 0, 1, 2, ... per cent."""
    zooms = [zoomed(x, 1 + step / 100) for step in range(steps)]
    return (x + np.sum(zooms, axis=0)) / (1 + steps)


# --- weather -----------------------------------------------------------------------------------


def snow(x: Floats, weather: tuple[float, ...], rng: np.random.Generator) -> Floats:
    """Add flakes, enlarged and smeared, from two sides; the picture itself turns pale."""
    loc, scale, zoom, threshold, radius, sigma, keep = weather
    flakes = rng.normal(loc, scale, (*x.shape[:3], 1)).astype(np.float32)
    flakes = zoomed(flakes, zoom)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = smeared(flakes, int(radius), sigma, rng.uniform(-135, -45, len(x)))
    pale = np.maximum(x, 1.5 * grey(x) + 0.5)
    return keep * x + (1 - keep) * pale + flakes + flakes[:, ::-1, ::-1]


def frost(x: Floats, weather: tuple[float, float], rng: np.random.Generator) -> Floats:
    """Show each picture through another part of a sheet of ice."""
    keep, cover = weather
    _, height, width, _ = x.shape
    sheet = ice(rng, 8 * max(height, width))
    tops, lefts = rng.integers(7 * max(height, width), size=(2, len(x)))
    cut = [
        sheet[top : top + height, left : left + width]
        for top, left in zip(tops, lefts, strict=True)
    ]
    return keep * x + cover * np.stack(cut)


def ice(rng: np.random.Generator, size: int) -> Floats:
    """Draw a texture (size, size, 3) of bluish needles.

    It is noise smeared along many directions, of which each point shows the strongest.
    """
    needles = np.zeros((size, size), np.float32)
    for angle in rng.uniform(0, 180, 12):
        seeds = (rng.random((size, size)) < 0.004) * rng.uniform(0.4, 1, (size, size))
        line = smeared(seeds[None, ..., None].astype(np.float32), 12, 8, np.array([angle]))
        needles = np.maximum(needles, line[0, ..., 0] / line.max())
    clouds = ndimage.gaussian_filter(rng.standard_normal((size, size)), size / 32, mode="wrap")
    clouds = (clouds - clouds.min()) / np.ptp(clouds)
    white = 0.3 + 0.5 * clouds + 0.6 * blurred(needles[None, ..., None], 0.6)[0, ..., 0]
    tint = np.array([0.86, 0.95, 1.0])
    return (white[..., None] * tint).clip(0, 1).astype(np.float32)


def fog(x: Floats, weather: tuple[float, float], rng: np.random.Generator) -> Floats:
    thickness, roughness = weather
    n, height, width, _ = x.shape
    clouds = plasma(rng, n, max(height, width), roughness)[:, :height, :width, None]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + thickness * clouds) * brightest / (brightest + thickness)


def plasma(rng: np.random.Generator, n: int, size: int, decay: float) -> Floats:
    """Draw n clouds in [0, 1] by the diamond-square algorithm, on a torus of 2^k >= size points.

    Each halving of the mesh divides the range of the random offsets by decay squared.
    """
    side = 1 << (size - 1).bit_length()
    height = np.zeros((n, side, side), np.float32)
    step, amplitude = side, 1.0

    def offset(means: Floats) -> Floats:
        return means + rng.uniform(-amplitude, amplitude, means.shape).astype(np.float32)

    while step > 1:
        half = step // 2
        corners = height[:, ::step, ::step]
        rows = corners + np.roll(corners, -1, 1)
        centres = offset((rows + np.roll(rows, -1, 2)) / 4)
        height[:, half::step, half::step] = centres
        across = corners + np.roll(corners, -1, 2) + centres + np.roll(centres, 1, 1)
        height[:, ::step, half::step] = offset(across / 4)
        down = rows + centres + np.roll(centres, 1, 2)
        height[:, half::step, ::step] = offset(down / 4)
        step, amplitude = half, amplitude / decay**2
    height -= height.min(axis=(1, 2), keepdims=True)
    return height / height.max(axis=(1, 2), keepdims=True)


def brightness(x: Floats, more: float, _rng: np.random.Generator) -> Floats:
    """Raise HSV's value, and keep hue and saturation: all three colours by the same factor."""
    value = x.max(axis=-1, keepdims=True)
    brighter = (value + more).clip(0, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


# --- digital -----------------------------------------------------------------------------------


def contrast(x: Floats, factor: float, _rng: np.random.Generator) -> Floats:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + factor * (x - mean)


def elastic(x: Floats, rubber: tuple[float, ...], rng: np.random.Generator) -> Floats:
    """Apply an affine map, and then displacements that vary over `smoothness` of the side.

    The map moves three points by up to `shift` of the side.
    """
    strength, smoothness, shift = rubber
    n, height, width, _ = x.shape
    side = min(height, width)
    near, far = side // 2 - side // 3, side // 2 + side // 3
    points = np.array([[far, far, 1], [far, near, 1], [near, near, 1]], float)
    moved = np.repeat(points[None], n, axis=0)
    moved[:, :, :2] += rng.uniform(-shift * side, shift * side, (n, 3, 2))
    back = np.linalg.solve(moved, points[None])  # (N, 3, 3): from what moved to where it was

    fields = rng.uniform(-1, 1, (2, n, height, width))
    sigma = smoothness * side
    fields = strength * side * ndimage.gaussian_filter(fields, (0, 0, sigma, sigma), truncate=3)
    rows = np.arange(height)[None, :, None] + fields[0]
    columns = np.arange(width)[None, None, :] + fields[1]
    looks = np.stack([rows, columns, np.ones_like(rows)], axis=-1) @ back[:, None]
    return sampled(x, looks[..., 0], looks[..., 1])


def pixelate(x: Floats, scale: float, _rng: np.random.Generator) -> Floats:
    _, height, width, _ = x.shape
    small = int(width * scale), int(height * scale)
    box = Image.Resampling.BOX
    return by_picture(x, lambda p: p.resize(small, box).resize((width, height), box))


def jpeg(x: Floats, quality: int, _rng: np.random.Generator) -> Floats:
    def compressed(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return by_picture(x, compressed)


# --- what several of them need -----------------------------------------------------------------


def grey(x: Floats) -> Floats:
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return (x @ weights)[..., None]


def blurred(x: Floats, sigma: float) -> Floats:
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def zoomed(x: Floats, factor: float) -> Floats:
    """Enlarge the middle of each picture to its size, bilinear."""
    rows, columns = (magnifier(side, factor) for side in x.shape[1:3])
    return np.einsum("hi,wj,nijc->nhwc", rows, columns, x, optimize=True)


def magnifier(side: int, factor: float) -> NDArray[np.float32]:
    """Return the (side, side) matrix that enlarges a line of so many pixels about its middle."""
    middle = (side - 1) / 2
    looks = middle + (np.arange(side) - middle) / factor
    distances = np.abs(looks[:, None] - np.arange(side))
    return (1 - distances).clip(0, 1).astype(np.float32)


def smeared(x: Floats, radius: int, sigma: float, angles: NDArray[np.floating[Any]]) -> Floats:
    """Smear each picture to one side along its angle (degrees), as ImageMagick's motion blur.

    It takes 2 radius + 1 steps of one pixel, with the weights of half a Gaussian.
    """
    n, height, width, _ = x.shape
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    radians = np.deg2rad(angles)
    each = np.arange(n)[:, None, None]
    result = np.zeros_like(x)
    for step, weight in zip(steps, weights, strict=True):
        down = np.rint(step * np.sin(radians)).astype(int)[:, None]
        right = np.rint(step * np.cos(radians)).astype(int)[:, None]
        rows = (np.arange(height) + down).clip(0, height - 1)
        columns = (np.arange(width) + right).clip(0, width - 1)
        result += np.float32(weight) * x[each, rows[:, :, None], columns[:, None, :]]
    return result


def sampled(x: Floats, rows: NDArray[Any], columns: NDArray[Any]) -> Floats:
    """Read x at (N, H, W) positions: bilinear, mirrored at the edges."""
    result = np.empty_like(x)
    for i in range(len(x)):
        for c in range(x.shape[-1]):
            where = rows[i], columns[i]
            ndimage.map_coordinates(x[i, ..., c], where, result[i, ..., c], order=1, mode="mirror")
    return result


def by_picture(x: Floats, change: Callable[[Image.Image], Image.Image]) -> Floats:
    changed = [np.asarray(change(Image.fromarray(picture))) for picture in as_bytes(x)]
    return np.stack(changed).astype(np.float32) / 255


CORRUPTIONS: dict[str, tuple[Corruption, tuple[Any, ...]]] = {
    "gaussian noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass blur": (glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom blur": (zoom_blur, (6, 11, 16, 21, 26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic": (
        elastic,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
}
