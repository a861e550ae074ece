"""The chat page in a real browser, over a fake engine: what a person does with it."""

import os
import time
from pathlib import Path

import pytest
from fixtures.browsers import DESKTOP, PHONE, WAIT_S, open_browser, require_browser
from fixtures.fake_engine import FakeEngine
from fixtures.http_calls import wait_for
from fixtures.servers import running_server

from internvl3_mlx.loading.resolve import DEMO_FOLDER
from internvl3_mlx.serving.access import AccessPolicy
from internvl3_mlx.serving.requests import ImagePart, VideoPart

SAMPLES = DEMO_FOLDER / "samples"
AXE = Path(__file__).parents[2] / ".ci" / "node" / "node_modules" / "axe-core" / "axe.min.js"
AXE_VARIABLE = "INTERNVL3_TEST_AXE"
BOX = "<ref>turtle</ref><box>[[80, 540, 480, 940]]</box>"
ANSWER = (
    "## What is there\n\nA **turtle**, *below* and `left`:\n\n1. shell\n2. legs\n   - four\n\n"
    "| thing | count |\n|---|---|\n| turtle | 1 |\n\n```python\nprint('<b>turtle</b>')\n```\n\n"
    "<script>document.title = 'hacked'</script> <img src=x onerror=alert(1)>\n\n"
    f"[site](https://example.org) [bad](javascript:alert(1)) {BOX}"
)
PIECES = tuple(ANSWER[at : at + 7] for at in range(0, len(ANSWER), 7))


class Page:
    """The page as a person uses it."""

    def __init__(self, driver, url):
        self.driver = driver
        self.open(url)

    def open(self, url):
        self.driver.get(url)
        assert wait_for(lambda: self.run("return document.documentElement.dataset.ready"), WAIT_S)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return wait_for(lambda: self.find(selector), WAIT_S)[0]

    def click(self, selector):
        """Click an element; where it was drawn anew in the meantime, its successor."""
        from selenium.common.exceptions import StaleElementReferenceException

        for _ in range(3):
            try:
                return self.one(selector).click()
            except StaleElementReferenceException:
                continue
        raise AssertionError(f"{selector} does not keep still")

    def press(self, label):
        self.click(f"[aria-label='{label}']")

    def type(self, text, selector="#question"):
        self.one(selector).send_keys(text)

    def ask(self, text):
        self.type(text + "\n")
        assert wait_for(self.has_answered, WAIT_S)

    def wait_for_answer(self, text):
        said = wait_for(
            lambda: self.texts(".assistant .markdown") == [text] and self.has_answered(), WAIT_S
        )
        assert said, self.texts(".assistant .markdown")

    def has_answered(self):
        return self.find(".assistant.last .row") and not self.find("[aria-busy]")

    def drop(self, *paths):
        """Drop files onto the page, as from the desktop."""
        field = self.run(
            "const field = document.createElement('input'); field.type = 'file';"
            "field.multiple = true; field.id = 'dropped'; document.body.append(field);"
            "return field"
        )
        field.send_keys("\n".join(map(str, paths)))
        self.run(
            "const data = new DataTransfer();"
            "for (const file of arguments[0].files) data.items.add(file);"
            "const event = (name) => document.body.dispatchEvent(new DragEvent(name,"
            " {dataTransfer: data, bubbles: true, cancelable: true}));"
            "event('dragenter'); event('dragover'); event('drop'); arguments[0].remove()",
            field,
        )
        assert wait_for(lambda: self.find("#attachments li"), WAIT_S)

    def texts(self, selector):
        script = (
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText.trim())"
        )
        return self.run(script, selector)

    def text(self, selector):
        return (wait_for(lambda: self.texts(selector), WAIT_S) or [""])[0]

    def errors(self):
        return [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def server():
    require_browser()
    with running_server(FakeEngine(pieces=PIECES)) as running:
        yield running


@pytest.fixture(scope="module")
def desktop(server):
    with open_browser(DESKTOP) as driver:
        yield driver


@pytest.fixture
def page(desktop, server):
    server.engine.pieces, server.engine.pause_s = PIECES, 0.0
    page = Page(desktop, server.url)
    page.click("#quick-new")
    yield page
    assert page.errors() == []


def test_an_image_is_dropped_and_asked_about(page, server):
    page.drop(SAMPLES / "four_corners.jpg")
    assert "10 tiles" in page.text("#attached-size")
    page.ask("What is there?")
    text, image = server.engine.requests[-1].messages[0].parts[::-1]
    assert text.text == "What is there?"
    assert isinstance(image, ImagePart)
    assert image.image == (SAMPLES / "four_corners.jpg").read_bytes()
    assert page.texts(".assistant .markdown h4") == ["What is there"]
    assert page.texts(".assistant strong") == ["turtle", "turtle"]
    assert page.texts(".assistant ol > li")[0] == "shell"
    assert page.texts(".assistant ol ul li") == ["four"]
    assert page.texts(".assistant td") == ["turtle", "1"]
    assert page.texts(".assistant pre") == ["print('<b>turtle</b>')"]
    assert wait_for(lambda: page.texts(".box span") == ["turtle"], WAIT_S)
    assert "tok/s" in page.text(".assistant .fine")
    assert server.engine.requests[-1].config.keep_boxes


def test_text_of_the_model_is_never_html(page):
    page.ask("What is there?")
    assert page.driver.title != "hacked"
    assert page.find(".assistant img, .assistant script") == []
    assert "<script>document.title = 'hacked'</script>" in page.text(".assistant .markdown")
    links = [link.get_attribute("href") for link in page.find(".assistant a")]
    assert links == ["https://example.org/"]


def test_an_answer_is_stopped_and_continued(page, server):
    server.engine.pieces, server.engine.pause_s = tuple("word " for _ in range(400)), 0.02
    page.type("Tell a story.\n")
    assert wait_for(lambda: "word word" in page.text(".assistant .markdown"), WAIT_S)
    page.click("#stop")
    assert wait_for(page.has_answered, WAIT_S)
    assert wait_for(lambda: server.engine.streams[-1].closed)
    assert "stopped" in page.text(".assistant .fine")
    before = page.text(".assistant .markdown")
    server.engine.pieces, server.engine.pause_s = ("and the end.",), 0.0
    page.press("Continue the answer")
    assert wait_for(lambda: "and the end." in page.text(".assistant .markdown"), WAIT_S)
    assert page.text(".assistant .markdown").startswith(before)
    assert server.engine.requests[-1].continue_final_message


def test_escape_stops_an_answer(page, server):
    server.engine.pieces, server.engine.pause_s = tuple("word " for _ in range(400)), 0.02
    page.type("Tell a story.\n")
    page.one("#stop:not([hidden])")
    page.type("\ue00c")
    assert wait_for(page.has_answered, WAIT_S)


def test_retries_and_edits_are_branches(page, server):
    server.engine.pieces = ("First.",)
    page.ask("What?")
    server.engine.pieces = ("Second.",)
    page.press("Answer again")
    page.wait_for_answer("Second.")
    assert page.texts(".turns") == ["2 of 2"]
    page.press("Previous version")
    assert page.texts(".assistant .markdown") == ["First."]
    page.type("\ue013")  # arrow up: edit the last question
    server.engine.pieces = ("Third.",)
    page.type(" And why?\n", ".editing textarea")
    page.wait_for_answer("Third.")
    assert page.texts(".bubble") == ["What? And why?"]
    assert server.engine.requests[-1].messages[0].text == "What? And why?"
    page.press("Previous version")
    assert page.texts(".bubble") == ["What?"]
    page.press("Branch into a new conversation")
    assert wait_for(lambda: page.texts(".turns") == [], WAIT_S)
    assert page.texts(".assistant .markdown") == ["First."]


def test_the_history_survives_a_reload(page, server):
    page.drop(SAMPLES / "dog.jpg")
    server.engine.pieces = ("A dog.",)
    page.ask("What is this?")
    address = page.driver.current_url
    page.open(server.url)
    page.open(address)
    assert page.texts(".assistant .markdown") == ["A dog."]
    assert wait_for(
        lambda: page.run("return document.querySelector('.picture img')?.naturalWidth"), WAIT_S
    )
    page.ask("Why?")
    asked = server.engine.requests[-1].messages
    assert [message.role for message in asked] == ["user", "assistant", "user"]
    assert asked[0].parts[0].image == (SAMPLES / "dog.jpg").read_bytes()
    page.click("#open-history")
    assert "What is this?" in page.texts("#conversations .open")
    page.click("#close-history")


def test_a_reload_in_the_middle_of_an_answer_keeps_what_was_said(page, server):
    server.engine.pieces, server.engine.pause_s = tuple("word " for _ in range(400)), 0.02
    page.type("Tell a story.\n")
    time.sleep(1.5)  # it is saved every 0.7 s
    page.driver.refresh()
    assert wait_for(page.has_answered, WAIT_S)
    assert page.text(".assistant .markdown").startswith("word word")
    assert "stopped" in page.text(".assistant .fine")


def test_settings_are_sent_and_kept(page, server):
    page.click("#open-settings")
    page.type("Be brief.", "#set-system")
    page.type("0.5", "#set-temperature")
    page.type("6", "#set-max_tiles")
    page.type("77", "#set-max_tokens")
    page.click("#set-think")
    page.click("#set-show_tiles")
    page.click(".dialog-foot .primary")
    page.open(server.url)
    page.drop(SAMPLES / "four_corners.jpg")
    assert "5 tiles" in page.text("#attached-size")
    assert len(page.find("#attachments .tile")) == 4
    page.ask("What?")
    request = server.engine.requests[-1]
    config = request.config
    assert (config.system, config.temperature, config.max_tiles, config.max_tokens) == (
        "Be brief.", 0.5, 6, 77,
    )  # fmt: skip
    assert request.think
    page.click("#open-settings")
    page.click("#reset-settings")
    page.click(".dialog-foot .primary")


def test_a_thought_is_folded(page, server):
    server.engine.pieces = ("<think>Hmm, ", "a dog.</think>", "A dog.")
    page.ask("What?")
    assert page.texts(".assistant > .markdown") == ["A dog."]
    assert not page.one(".thinking").get_attribute("open")
    page.click(".thinking summary")
    assert page.texts(".thinking .markdown") == ["Hmm, a dog."]


def test_an_error_is_shown_and_asking_goes_on(page, server):
    from internvl3_mlx.serving.requests import AnswerFailed

    server.engine.late_fault = AnswerFailed("the GPU ran out of memory")
    page.ask("What?")
    assert page.texts(".assistant .note") == ["the GPU ran out of memory"]
    server.engine.late_fault = None
    page.press("Answer again")
    assert wait_for(lambda: page.find(".assistant h4"), WAIT_S)


def test_pdfs_and_videos_are_sent_as_such(page, server, tmp_path):
    from PIL import Image

    Image.new("RGB", (90, 70), "red").save(tmp_path / "a.pdf")
    (tmp_path / "b.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (tmp_path / "c.txt").write_text("no")
    page.drop(tmp_path / "a.pdf", tmp_path / "b.mp4", tmp_path / "c.txt")
    assert wait_for(lambda: len(page.find("#attachments li")) == 2, WAIT_S)
    assert "c.txt is not an image" in page.texts(".note")[0]
    page.ask("What?")
    shown = server.engine.requests[-1].messages[0].parts
    assert isinstance(shown[0], ImagePart)
    assert isinstance(shown[1], VideoPart)


def test_the_image_is_shown_large_with_its_tiles(page):
    page.drop(SAMPLES / "four_corners.jpg")
    page.click("#attachments .picture")
    assert len(page.find("#viewer .tile")) == 9
    assert "10 tiles (3 × 3 and the whole)" in page.text("#viewer-caption")
    page.click("#viewer-tiles")
    assert page.find("#viewer .tile") == []
    page.click("#viewer-close")


def test_a_phone_in_the_same_network(server):
    """The address in the QR code brings the key along; the page fits, nothing scrolls sideways."""
    engine = FakeEngine(pieces=PIECES)
    with (
        running_server(engine, policy=AccessPolicy("s3cret")) as locked,
        open_browser(PHONE) as driver,
    ):
        page = Page(driver, f"{locked.url}/#key=s3cret")
        assert "s3cret" not in driver.current_url
        assert page.one("#photograph").is_displayed()
        page.drop(SAMPLES / "four_corners.jpg")
        page.ask("What is there?")
        assert wait_for(lambda: page.texts(".box span") == ["turtle"], WAIT_S)
        width = page.run("return document.documentElement.scrollWidth")
        assert width == PHONE[0]
        page.click("#open-history")
        assert page.run("return document.getElementById('stage').inert")
        page.click("#close-history")
        assert page.errors() == []


def test_a_key_is_asked_for(server):
    engine = FakeEngine(pieces=("Yes.",))
    with (
        running_server(engine, policy=AccessPolicy("s3cret")) as locked,
        open_browser(DESKTOP) as driver,
    ):
        page = Page(driver, locked.url)
        assert "needs its key" in page.text(".note")
        page.click("#open-settings")
        page.type("s3cret", "#set-key")
        page.click(".dialog-foot .primary")
        assert wait_for(lambda: page.find("#model option"), WAIT_S)
        page.ask("Hi")
        assert page.texts(".assistant .markdown") == ["Yes."]


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_serious(server, dark):
    path = Path(os.environ.get(AXE_VARIABLE, AXE))
    if not path.is_file():
        pytest.skip("axe-core is not installed: npm install --prefix .ci/node axe-core")
    server.engine.pieces = PIECES
    with open_browser(DESKTOP, dark=dark) as driver:
        page = Page(driver, server.url)
        page.run(path.read_text("utf-8"))
        found = serious_findings(driver)
        page.drop(SAMPLES / "four_corners.jpg")
        page.ask("What is there?")
        page.click("#open-history")
        found += serious_findings(driver)
        page.click("#open-settings")
        found += serious_findings(driver)
    assert found == []


def serious_findings(driver):
    result = driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(done, (e) => done(String(e)))"
    )
    return [
        (one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"])
        for one in result["violations"]
        if one["impact"] in ("serious", "critical")
    ]
