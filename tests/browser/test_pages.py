"""The pages in a real browser, over a live server with tiny models: what people see, do and read.

Skipped, with the reason, where no Chromium is installed (`apt-get install chromium`).
"""

import shutil
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from tests.live_server import running, wait_until_ready
from tests.tiny_bundle import write_tiny_bundle

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = {"width": 390, "height": 844}

expect.set_options(timeout=30_000)  # five seconds are few on a busy machine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    bundle = write_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    with running(bundle, tmp_path_factory.mktemp("serve") / "log") as (_, client):
        wait_until_ready(client)
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A page that must ask no other host and print no error; a test that expects one empties `page.problems`."""
    context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    problems = opened.problems = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: _note_foreign(request.url, address, problems))
    yield opened
    assert problems == []
    context.close()


def _note_foreign(url, address, problems):
    if urlsplit(url).scheme in ("http", "https") and not url.startswith(f"{address}/"):
        problems.append(f"asked {url}")


def test_a_question_gets_ranked_results_with_their_reasons(page):
    page.goto("/")
    expect(page.get_by_role("heading", name="Search 5 documents")).to_be_visible()
    page.get_by_role("button", name="write code").click()
    hits = page.locator(".hit")
    expect(hits).to_have_count(5)
    scores = [float(text) for text in page.locator(".hit .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    coder = hits.filter(has=page.get_by_role("heading", name="Programmer"))
    expect(coder.locator("mark").first).to_have_text("Write")
    expect(coder).to_contain_text("found by bm25")
    expect(coder).to_contain_text("words in tasks")
    coder.get_by_text("Why this result").click()
    for text in ("bm25", "embedding", "first stage: rrf", "ranker (yes − no)", "order: ranker", "calibrated"):
        expect(coder.get_by_role("rowheader", name=text)).to_be_visible()
    expect(page.locator(".legend")).to_contain_text("rank")
    assert "q=write+code" in page.url


def test_filters_and_facets_narrow_the_results_and_can_be_removed(page):
    page.goto("/?q=work")
    expect(page.locator(".hit")).to_have_count(5)
    page.get_by_role("group", name="remote").get_by_label("false").check()
    expect(page.locator(".hit")).to_have_count(3)
    page.get_by_label("pay at least").fill("45")
    page.keyboard.press("Enter")
    expect(page.locator(".hit h3")).to_have_text(["Nurse"])
    page.get_by_label("pay at least").fill("1000")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Nothing found")).to_be_visible()
    page.get_by_role("button", name="Remove the filters").click()
    expect(page.locator(".hit")).to_have_count(5)
    page.go_back()
    expect(page.get_by_role("heading", name="Nothing found")).to_be_visible()


def test_the_order_can_be_switched_and_the_address_keeps_it(page):
    page.goto("/?q=write+code")
    expect(page.locator(".hit")).to_have_count(5)
    expect(page.locator(".summary")).to_contain_text("in the order ranker, 5 read by the ranker")
    page.get_by_label("Order").select_option(label="bm25")
    expect(page.locator(".hit")).to_have_count(2)
    expect(page.locator(".summary")).to_contain_text("in the order bm25, the ranker not asked")
    page.locator(".hit").first.get_by_text("Why this result").click()
    expect(page.locator(".hit").first).to_contain_text("Sorted by bm25, without the ranker.")
    assert "order=bm25" in page.url
    page.reload()
    expect(page.locator(".hit")).to_have_count(2)
    page.get_by_label("Order").select_option(label="ranker (served)")
    expect(page.locator(".hit")).to_have_count(5)


def test_orders_side_by_side(page):
    page.goto("/?q=write+code")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".compare h2")).to_have_text(["BM25", "Embedding", "Fused: rrf", "Rankerserved"])
    columns = page.locator(".compare section")
    expect(columns.nth(0).locator("li")).to_have_count(2)
    expect(columns.nth(2).locator("li")).to_have_count(5)
    expect(columns.nth(3).locator("li")).to_have_count(5)
    columns.nth(0).locator("li").first.hover()
    expect(page.locator(".compare li.same")).to_have_count(4)
    assert "mode=compare" in page.url


def test_the_keyboard_is_enough(page):
    page.goto("/")
    expect(page.get_by_role("heading", name="Search 5 documents")).to_be_visible()
    page.get_by_role("searchbox").press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("bread")
    page.keyboard.press("Enter")
    expect(page.locator(".hit")).to_have_count(5)
    page.get_by_role("searchbox").press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(page.locator(".hit").nth(1)).to_be_focused()
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    expect(page.locator(".hit").first.locator(".why table")).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    expect(page.locator(".compare")).to_be_visible()
    assert "mode=compare" in page.url


def test_errors_say_what_to_do(page):
    page.goto("/")
    page.get_by_role("searchbox").fill("q" * 1500)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("This request cannot be answered")
    page.get_by_role("searchbox").fill("bread")
    page.context.set_offline(True)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    page.context.set_offline(False)
    expect(page.locator(".hit")).to_have_count(5, timeout=15_000)  # it tries again by itself
    assert any("400" in problem for problem in page.problems)
    page.problems.clear()  # the browser's own lines about both


def test_it_fits_a_phone(page):
    page.set_viewport_size(PHONE)
    for path in ("/?q=write+code", "/?q=write+code&mode=compare", "/status"):
        page.goto(path)
        page.wait_for_load_state("networkidle") if "status" not in path else page.locator(
            ".tile"
        ).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path


def test_documents_are_text_and_never_markup(page):
    page.goto("/?q=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    expect(page.locator(".hit")).to_have_count(5)
    assert page.locator("main img").count() == 0
    policy = page.request.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy


def test_status_shows_the_servers_own_metrics(page):
    page.goto("/?q=bread")
    expect(page.locator(".hit")).to_have_count(5)
    page.goto("/status")
    expect(page.locator(".tile").filter(has_text="Compilations after ready").locator("strong")).to_have_text(
        "0"
    )
    counted = page.locator("#requests").get_by_role("row").filter(has_text="/v1/search").locator("td")
    expect(counted.nth(1)).to_have_text("200")
    asked = page.request.get("/metrics").text()
    assert f'requests_total{{path="/v1/search",status="200"}} {counted.nth(2).inner_text()}.0' in asked
    expect(page.locator("#stages").get_by_role("row").filter(has_text="rank")).to_be_visible()
    by_path = page.locator("#latency").get_by_role("row").filter(has_text="/v1/search").locator("td")
    assert int(by_path.nth(1).inner_text()) >= int(counted.nth(2).inner_text())  # of every status
    expect(by_path.nth(4)).to_contain_text("s")


def test_the_api_page_works_without_the_internet(page):
    page.goto("/docs")
    expect(page.get_by_text("/v1/search")).to_be_visible()
    assert (
        page.evaluate("typeof SwaggerUIBundle") == "function"
    )  # the page's own copy: none is fetched elsewhere


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/?q=write+code", "/?q=write+code&mode=compare", "/status"])
def test_axe_finds_nothing_serious(page, path, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(path)
    page.locator(".notice:visible, .hit, .compare, .tile").first.wait_for()
    found = Axe().run(page).response["violations"]
    serious = [
        f"{entry['id']}: {entry['nodes'][0]['html']}"
        for entry in found
        if entry["impact"] in ("serious", "critical")
    ]
    assert serious == []
