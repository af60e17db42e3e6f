"""Results in a REPL, one short line each, and in a notebook, as tables that anybody can read."""

import dataclasses
import pickle
import re
from collections import Counter, namedtuple
from html.parser import HTMLParser

import nets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import networks
from promises import calibrated
from torch import nn
from torch.fx.experimental.optimization import fuse

import retrofit
from retrofit import (
    BatchDrift,
    Calibration,
    Difference,
    Drift,
    Plan,
    Restoration,
    Seat,
    Site,
    SiteSample,
    Verification,
)

HOSTILE = (
    '</table><script>alert(\'1\')</script>"><img src=x onerror="alert(1)">&amp;\x1b[31m\u202e\n'
)
TAGS = {"div", "style", "p", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "wbr"}
TAGS |= {"details", "summary", "ol", "li"}
ATTRIBUTES = {"class", "scope", "style", "aria-hidden"}
X = nets.images(48, 3, 16, 16)


class View(HTMLParser):
    """What is in a view: tables as rows of cells, and the bars, as numbers from 0 to 100.

    Reading it fails where an element is left open, or is none that a view has.
    """

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.captions, self.bars, self.text = [], [], [], [], ""
        self.folded, self.style, self.items = 0, "", []
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.captions) == len(self.tables)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag in TAGS
        assert attributes.keys() <= ATTRIBUTES
        if tag == "wbr":
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.folded += "details" in self.open
        if tag == "caption":
            self.captions.append("")
        if tag == "li":
            assert "details" in self.open
            self.items.append("")
        if tag == "tr":
            self.tables[-1].append([])
        if tag == "th":
            assert attributes["scope"] == ("col" if "thead" in self.open else "row")
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if "style" in attributes:
            self.bars.append(float(re.fullmatch(r"width: ([\d.]+)%", attributes["style"])[1]))
            assert 0 <= self.bars[-1] <= 100
        if attributes.get("class") == "bar":  # beside its number, which is read out
            assert attributes["aria-hidden"] == "true"
            assert re.search(r"\d|inf|nan", self.tables[-1][-1][-1])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "style":
            self.style += data
            return
        self.text += data
        if "caption" in self.open:
            self.captions[-1] += data
        elif "li" in self.open:
            self.items[-1] += data
        elif {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def rows(self, first, *others):
        """The rows of a table, and of those to unfold after it, without their heads."""
        head, *rows = self.tables[first]
        for other in others:
            assert self.tables[other][0] == head
            rows += self.tables[other][1:]
        return rows


def view(result):
    return View(result._repr_html_())


class Deep(nn.Module):
    """Of so many convolutions, one of them never called."""

    def __init__(self, convolutions):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(convolutions)))
        self.idle = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.relu(self.layers(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def results():
    """What the functions return for a network of 30 convolutions, and for a small one folded."""
    torch.manual_seed(0)
    model = Deep(30).eval()
    plan = retrofit.plan(model)
    prepared = retrofit.prepare(model, plan)
    calibration = retrofit.calibrate(prepared, X.split(8), progress=False)
    converted = retrofit.convert(prepared)
    verification = retrofit.verify(model, converted, [X])
    drift = retrofit.drift(model, converted, [X], [4, 16, 64])
    stock = nets.build(nets.AlreadyNormed)
    restored = retrofit.restore(stock, fuse(stock), list(X.split(16)), progress=False)
    recalibration = retrofit.recalibrate(converted, X.split(8) * 2, progress=False)
    adapting = retrofit.adapting(stock)
    stock(X[:5])
    return {
        "plan": plan,
        "calibration": calibration,
        "verification": verification,
        "unlike": retrofit.verify(model, converted, [X + 1]),
        "drift": drift,
        "restoration": retrofit.restoration_of(restored),
        "recalibration": recalibration,
        "adapting": adapting,
        "moments": retrofit.channel_moments(prepared)["layers.3"],
    }


# --- in a REPL ---------------------------------------------------------------------------------


def is_short(result):
    """Tell whether it is one line of printable characters that begins with the class."""
    text = repr(result)
    whole = re.fullmatch(rf"{type(result).__name__}\(.+\)", text)
    return bool(whole) and len(text) <= 200 and text.isprintable()


def test_a_repr_is_a_line_with_the_numbers_that_one_asks_for(results):
    def begins(name, text):
        assert is_short(results[name])
        assert repr(results[name]).startswith(text)

    begins("plan", "Plan(Deep: 30 of 31 convolutions get a BatchNorm; skipped: not called in")
    begins("calibration", "Calibration(48 images in 6 batches; standard error of 99 % of the chann")
    assert f"{results['calibration'].standard_error:.2%} of sigma" in repr(results["calibration"])
    begins("verification", "Verification(equal bit for bit on 48 images, top-1 agreement 100.00%; ")
    assert "30 layers and 1 output; print it" in repr(results["verification"])
    worst = max(results["unlike"].sites, key=lambda site: site.relative)
    begins("unlike", "Verification(NOT equal bit for bit on 48 images, top-1 agreement ")
    assert f"of 31 tensors differ, most {worst.name} by {worst.relative:.3g}" in repr(
        results["unlike"]
    )
    four, sixteen = results["drift"].rows
    begins(
        "drift", f"Drift(batches of 4: error {four.error:.3f}, same top-1 {four.top1:.2%}; of 16"
    )
    begins("restoration", "Restoration(")
    error = results["recalibration"].standard_error
    told = f"Recalibration(30 BatchNorms on 96 images in 12 batches; standard error {error:.2%} of"
    begins("recalibration", told)
    begins("adapting", f"Adapting({len(results['adapting'].layers)} BatchNorms, after 5 images)")
    mean = results["moments"].mean
    begins("moments", f"ChannelMoments(3 channels: mean {mean.min():.3g} to {mean.max():.3g}, var ")


def test_a_handle_says_that_it_was_removed():
    model = retrofit.add_batchnorm(nets.build(nets.Residual), X.split(8), progress=False)
    for handle in (retrofit.recalibrate(model, [X], progress=False), retrofit.adapting(model)):
        assert "removed" not in repr(handle) + view(handle).text
        handle.remove()
        assert "removed" in repr(handle)
        assert "removed" in view(handle).text


def test_what_is_printed_of_one_layer_has_all_fields(results):
    calibration, restoration = results["calibration"], results["restoration"]
    for item in (
        results["plan"].sites[0],
        calibration.sites[0],
        results["unlike"].sites[0],
        *restoration.seats[:1],
    ):
        names = [field.name for field in dataclasses.fields(item)]
        twin = dataclasses.make_dataclass(type(item).__name__, names)
        assert str(item) == repr(twin(**vars(item)))
        assert is_short(item)
    moments = results["moments"]
    assert str(moments) == repr(namedtuple("ChannelMoments", "mean var")(*moments))  # noqa: PYI024


@pytest.mark.parametrize("name", ["plan", "calibration", "verification", "drift", "restoration"])
def test_results_are_pickled_and_compared_as_ever(results, name):
    result = results[name]
    again = pickle.loads(pickle.dumps(result))  # noqa: S301
    assert again == result
    assert dataclasses.replace(result) == result
    assert str(again) == str(result)


# --- in a notebook -----------------------------------------------------------------------------


def test_a_plan_shows_what_layers_get_and_each_of_them(results):
    plan = results["plan"]
    shown = view(plan)
    counts = Counter(site.decision for site in plan.sites)
    assert shown.captions[0] == "Deep: 30 of 31 convolutions get a BatchNorm"
    assert [row[:2] for row in shown.rows(0)] == [
        ["BatchNorm", str(counts["insert"])],
        ["none", str(counts["skip"])],
    ]
    assert shown.rows(0)[1][2] == "not called in eval mode"
    assert shown.bars == pytest.approx([100 * 30 / 31, 100 / 31], abs=0.06)
    assert shown.rows(1, 2) == [
        [s.path, s.kind, str(s.channels), s.norm or "none", s.reason] for s in plan.sites
    ]
    assert len(shown.tables[1]) == 1 + 10
    assert shown.folded == 1
    assert "21 more rows" in shown.text


def test_a_calibration_shows_the_standard_errors_by_layer(results):
    calibration = results["calibration"]
    shown = view(calibration)
    errors = [max(site.mean_error, site.std_error) for site in calibration.sites]
    rows = shown.rows(0, 1)
    assert [row[0] for row in rows] == [site.site for site in calibration.sites]
    assert [row[1] for row in rows] == [f"{100 * error:.2f}%" for error in errors]
    assert [float(row[2]) for row in rows] == pytest.approx(
        [site.mean for site in calibration.sites], abs=6e-4
    )
    assert shown.bars == pytest.approx([100 * e / max(errors) for e in errors], abs=0.06)
    assert f"{calibration.standard_error:.2%}" in shown.captions[0]
    needed = [int(n.replace(",", "")) for n in re.findall(r"\d%: ([\d,]+)", shown.text)]
    assert needed == [calibration.images_needed(t) for t in (0.01, 0.02, 0.05)]


def test_a_calibration_on_images_in_some_order_says_so():
    prepared = retrofit.prepare(nets.build(nets.Residual))
    ordered = [X, X + 3]
    with pytest.warns(UserWarning, match="the two halves"):
        found = retrofit.calibrate(prepared, ordered, progress=False)
    assert found.disordered.site in repr(found)
    assert is_short(found)
    assert f"most at {found.disordered.site}" in view(found).text


def test_a_standard_error_that_is_not_known_is_called_so():
    found = Calibration(0, 0, 0.0, 0.0, float("inf"), ())
    for text in (repr(found), view(found).captions[0]):
        assert "standard error of 99 % of the channels not known" in text
        assert "inf" not in text


@pytest.mark.parametrize("name", ["verification", "unlike"])
def test_a_verification_shows_each_tensor(results, name):
    result = results[name]
    shown = view(result)
    all_of_them = [*result.sites, *result.outputs]
    for row, difference in zip(shown.rows(0, 1), all_of_them, strict=True):
        assert row[0] == difference.name
        assert row[1] == ("yes" if difference.exact else "no")
        found = [float(cell) for cell in row[2:]]
        assert found == pytest.approx([difference.max_abs, difference.relative], rel=6e-3)
    assert ("NOT equal bit for bit" in shown.captions[0]) == (name == "unlike")


def test_a_drift_shows_the_error_by_batch_size(results):
    drift = results["drift"]
    shown = view(drift)
    largest = max(row.error for row in drift.rows)
    for cells, row in zip(shown.rows(0), drift.rows, strict=True):
        assert [int(cells[0]), int(cells[3])] == [row.batch_size, row.images]
        assert float(cells[1]) == pytest.approx(row.error, abs=6e-4)
        assert float(cells[2].rstrip("%")) == pytest.approx(100 * row.top1, abs=6e-3)
    bars = [share for row in drift.rows for share in (row.error / largest, row.top1)]
    assert shown.bars == pytest.approx([100 * share for share in bars], abs=0.06)
    assert "too few images for batches of 64" in shown.text


def test_a_restoration_shows_each_batchnorm(results):
    restoration = results["restoration"]
    shown = view(restoration)
    assert len(restoration.seats) > 0
    for row, seat in zip(shown.rows(0), restoration.seats, strict=True):
        assert row[:3] == [seat.norm, seat.layer, str(seat.channels)]
        assert float(row[4]) == pytest.approx(seat.relative, rel=0.06)


def test_handles_show_what_they_have_seen_and_where(results):
    recalibration, adapting = results["recalibration"], results["adapting"]
    shown = view(recalibration)
    facts = dict(shown.tables[0])
    assert facts == {"images": "96", "batches": "12", "passes over the data": "1"}
    assert shown.items == list(recalibration.layers)
    waited = retrofit.recalibrate(
        nets.build(nets.AlreadyNormed), [X], layerwise=True, progress=False
    )
    number, unit = dict(view(waited).tables[0])["memory of waiting batches"].split()
    assert waited.held > 0
    assert unit == "MiB"
    assert abs(float(number) - waited.held / 1024**2) <= 0.05
    shown = view(adapting)
    assert dict(shown.tables[0]) == {"images": "5", "prior": "64 images", "window": "none"}
    assert shown.items == list(adapting.layers)


def test_a_network_without_convolutions_has_a_view_too():
    plan = retrofit.plan(nn.Sequential(nn.Linear(3, 4)))
    assert view(plan).text.strip() == "Sequential has no convolutions"
    assert is_short(plan)


def test_a_view_takes_its_colours_from_the_page(results):
    for name, result in results.items():
        if name == "moments":
            continue
        style = view(result).style
        colours = re.findall(r"(?:color|background|border[\w-]*): *([^;}]+)", style)
        assert set(colours) <= {
            "currentColor",
            "inherit",
            "0",
            "collapse",
            "1px solid rgb(128 128 128 / .4)",
            "1px solid rgb(128 128 128 / .7)",
        }
        assert "url" not in style
        assert "@import" not in style


# --- whatever the network ----------------------------------------------------------------------


@given(networks())
def test_any_network_s_results_are_shown_in_short_lines_and_sound_tables(drawn):
    data = [torch.randn(n, *drawn.shape).to(next(drawn.model.parameters())) for n in (5, 3)]
    plan, prepared, _ = calibrated(drawn.model, data, {})
    calibration = retrofit.calibrate(prepared, data, progress=False)
    verification = retrofit.verify(drawn.model, retrofit.convert(prepared), data)
    for result in (plan, calibration, verification):
        assert is_short(result)
        view(result)
    assert all(map(is_short, (*plan.sites, *calibration.sites, *verification.outputs)))
    assert sum(int(row[1]) for row in view(plan).rows(0)) == len(plan.sites)


@pytest.mark.parametrize("convolutions", [1, 10, 12, 13, 2000])
def test_a_network_of_any_depth_has_a_short_repr_and_all_of_its_layers_in_the_view(convolutions):
    plan = retrofit.plan(nets.build(nets.root_sequential))
    plan = dataclasses.replace(plan, sites=plan.sites[:1] * convolutions)
    assert is_short(plan)
    shown = view(plan)
    assert len(shown.rows(*range(1, len(shown.tables)))) == convolutions
    assert shown.folded == (convolutions > 12)
    assert len(plan._repr_html_()) < 300 * (convolutions + 10)


TEXTS = st.text(max_size=40) | st.sampled_from([HOSTILE, HOSTILE * 20, "a.block." * 90, "x" * 5000])
SIZES = st.floats(0, 1e6) | st.sampled_from([0.0, float("inf")])
COUNTS = st.integers(0, 10**12)
SHARES = st.none() | st.floats(0, 1)


def several(of):
    return st.lists(of, max_size=15).map(tuple)


def made(kind, **fields):
    """Objects of such a class: these fields, and of the others numbers or texts by their types."""
    by_type = {"str": TEXTS, "int": COUNTS, "float": SIZES, "bool": st.booleans()}
    chosen = {f.name: by_type[f.type] for f in dataclasses.fields(kind) if f.type in by_type}
    return st.builds(kind, **{**chosen, **fields})


SITES = made(
    Site,
    dims=st.sampled_from([0, 1, 2, 3]),
    decision=st.sampled_from(["insert", "skip"]),
    forwarded=st.just(()),
)
DIFFERENCES, SEATS = made(Difference), made(Seat)
SAMPLES = made(SiteSample)
RESULTS = st.one_of(
    made(Plan, sites=several(SITES), renumbered=st.just(()), last=st.none(), key_map=st.just({})),
    made(Calibration, sites=several(SAMPLES)),
    made(Verification, outputs=several(DIFFERENCES), sites=several(DIFFERENCES), top1=SHARES),
    made(Drift, rows=several(made(BatchDrift, top1=SHARES)), left_out=several(COUNTS)),
    made(Restoration, seats=several(SEATS), kept=several(TEXTS)),
)


@given(RESULTS)
def test_whatever_names_and_numbers_a_result_holds_its_views_are_sound(result):
    assert is_short(result)
    shown = view(result)
    assert all(character.isprintable() for character in shown.text.replace("\n", ""))


@given(SITES | DIFFERENCES | SEATS | SAMPLES)
def test_whatever_names_and_numbers_a_layer_has_its_repr_is_a_line(item):
    assert is_short(item)


def test_hostile_names_are_shown_as_they_are_written():
    site = Site(HOSTILE, HOSTILE, 3, 2, 1, "insert", HOSTILE)
    plan = Plan(HOSTILE, (site,), (), None, {})
    text = plan._repr_html_()
    assert "<script" not in text
    assert "<img" not in text
    assert "\x1b" not in text
    assert view(plan).rows(1)[0][0].startswith("</table><script>alert('1')")
    assert "\x1b" not in str(plan)
