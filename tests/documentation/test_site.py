"""The documentation as a site: what a reader's browser gets."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow  # the site takes several seconds to build

ROOT = Path(__file__).resolve().parents[2]
TAGS = set(
    re.findall(
        r"\w+",
        """
        a abbr article aside b base blockquote body br button code col dd del details dialog div dl
        dt em figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe img input
        ins kbd label li link main mark meta nav noscript ol option p pre s samp script section
        select small source span strong style sub summary sup table tbody td template textarea tfoot
        th thead time title tr u ul var video wbr
        svg path g defs circle rect line polyline polygon text
        """,
    )
)


class Page(HTMLParser):
    """What the test asks of a page: its tags, links, ids, images, and blocks of code."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.images = set(), set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.ids |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "img":
            self.images.append(attributes)
        for name in ("href", "src"):
            if attributes.get(name) is not None:
                self.links.append(attributes[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as `make docs` does."""
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}


def test_every_link_within_the_site_leads_to_a_file_and_every_anchor_to_a_place(site, pages):
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are from the root of a server
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].ids if target in pages else set()
            if not target.exists() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in known
            ):
                dead.append((str(path.relative_to(site)), link))
    assert not dead


def test_every_image_says_what_it_shows(site, pages):
    silent = {
        (str(path.relative_to(site)), image.get("src"))
        for path, page in pages.items()
        for image in page.images
        if not image.get("alt")
    }
    assert not silent


def test_nothing_in_angle_brackets_became_a_tag(site, pages):
    unknown = {
        str(path.relative_to(site)): page.tags - TAGS
        for path, page in pages.items()
        if page.tags - TAGS
    }
    assert not unknown


def test_examples_of_the_api_are_code_and_no_text(site):
    page = (site / "docs" / "api" / "index.html").read_text()
    blocks = re.findall(r"<code>(.*?)</code>", page, re.DOTALL)
    examples = [block for block in blocks if 'class="gp">&gt;&gt;&gt;' in block]
    source = "".join(path.read_text() for path in (ROOT / "retrofit").rglob("*.py"))
    assert len(examples) == len(re.findall(r"^ +Examples:$", source, re.MULTILINE))
    assert not re.search(r"^ +Example:$", source, re.MULTILINE)
    prose = re.sub(r"<code>.*?</code>|<details.*?</details>", "", page, flags=re.DOTALL)
    assert "&gt;&gt;&gt;" not in prose


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_window(chromium, site, pages, width, scripts):
    window = {"width": width, "height": 800}
    context = chromium.new_context(viewport=window, java_script_enabled=scripts)
    page = context.new_page()
    wide = {}
    for path in pages:
        if path.name != "404.html":
            page.goto(path.as_uri())
            if over := page.evaluate(OVERFLOW):
                wide[str(path.relative_to(site))] = over
    context.close()
    assert not wide
