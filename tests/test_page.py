"""results/page.py and its page: the numbers, the knobs, the steps and the looks of it, in Chromium."""

import json
import os
import random
import select
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import sapo
import srpo
import toy_env
import train_small
from results import credit, page, study

PAGE = study.HERE / "credit.html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KNOBS = {"ends": ["entropy", "newline", "step", "probability", "token", "once"], "k": range(1, 101),
         "lam": [i / 100 for i in range(101)], "gamma": [i / 100 for i in range(101)],
         "value_at": ["start", "last"], "contrast": ["-on_image", "on_perception"],
         "clip": [i / 20 for i in range(1, 20)], "temperature": [i / 20 for i in range(5, 81)]}
FIGURES = "entropy values old_log_probs log_probs on_image on_perception perception reasoning".split()


# ---------------------------------------------------------------------------------------------------- page.py
def test_the_committed_page_is_what_the_template_gives_and_asks_for_nothing_else(tmp_path, monkeypatch):
    text, data, old = PAGE.read_text(encoding="utf-8"), page.data_of(PAGE), tmp_path / "old.html"
    old.write_text(text.replace("<h1>", "<h1>Old: "), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["page", str(old)])
    page.main()
    assert old.read_text(encoding="utf-8") == page.render(data) == text and len(text.encode()) < 1e6
    assert {part.split('"')[0] for part in text.split("http")[1:]} == {  # links, and a meta element
        "s://arxiv.org/abs/2605.01327", "s://arxiv.org/abs/2605.07274", "-equiv="}
    kinds, stages = zip(*((r["kind"], r["stage"]) for r in data["responses"]))
    assert kinds == (*sorted(page.KINDS * page.EACH, key=page.KINDS.index), *[page.SAME] * 3)
    assert stages[-3:] == (0, 10, data["iterations"])


PROBLEM = toy_env.make_problem(3, operands=3, distractors=0, operators="+")  # pink 7 + cyan 7 + orange 1
TEXTS = {name: f"<perception> pink {reading}, orange 1, cyan 7 </perception> <think> {think} </think> "
               f"<answer> {answer} </answer>" for name, reading, think, answer in (
    ("right", 7, "pink 7 + cyan 7 = 14\n14 + orange 1 = 15", 15),
    ("right by luck", 1, "pink 7 + cyan 7 = 14\n14 + orange 1 = 15", 15),
    ("one slip, early", 7, "pink 7 + cyan 7 = 13\n13 + orange 1 = 14", 14),
    ("one slip, late", 7, "pink 7 + cyan 7 = 14\n14 + orange 1 = 16", 16),
    ("a misread cell", 1, "pink 1 + cyan 7 = 8\n8 + orange 1 = 9", 9),
    ("two slips", 7, "pink 7 + cyan 7 = 13\n13 + orange 1 = 16", 16),
    ("a missing line", 7, "pink 7 + cyan 7 = 14", 14))}


def test_a_response_is_of_the_kind_that_it_is_called():
    found = [page.kind_of(PROBLEM, text, toy_env.reward(PROBLEM, text)) for text in TEXTS.values()]
    assert found == [*page.KINDS, None, None]


def test_chosen_are_other_problems_from_groups_with_both_outcomes_and_one_that_training_taught(monkeypatch):
    monkeypatch.setattr(credit, "GROUP", 2)

    def rolls(groups):  # of responses that are right, right by luck, wrong early or late, misread
        texts = [[*TEXTS.values()]["RUELM".index(x)] for x in groups.replace(" ", "")]
        outcome = torch.tensor([toy_env.reward(PROBLEM, text) for text in texts])
        return SimpleNamespace(problems=[PROBLEM] * len(texts), texts=texts, outcome=lambda: outcome)

    stages = {0: "LR RR RR RR RR EM", 10: "RE ER ER UU MR RR", 20: "RR RR RR RR RR RE"}
    found = page.choose({stage: rolls(groups) for stage, groups in stages.items()})
    assert found == [("right", 10, 3), ("right", 10, 5), ("one slip, early", 20, 11),
                     ("a misread cell", 10, 8), *((page.SAME, stage, 0) for stage in (0, 10, 20))]


def test_a_run_becomes_data_that_the_page_can_use(tmp_path, monkeypatch):
    monkeypatch.setattr(train_small.options, "best_device", lambda: "cpu")  # the page's
    config = train_small.complete(train_small.Config(
        operands=2, iterations=20, corruption="blank", device="cpu", out=str(tmp_path), save=True))
    policy, processor, critic, _ = train_small.load(config)
    critic.head.weight.data.normal_()
    (tmp_path / "run.json").write_text(json.dumps(dict(config=vars(config) | dict(model="/not/here"))))
    policy.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    torch.save(critic.state_dict(), tmp_path / "critic.pt")
    [parameter.data.mul_(1.02) for parameter in policy.parameters()]  # the checkpoints' are others
    for i in (20, 10):
        torch.save(dict(policy=policy.state_dict(), critic=None), tmp_path / f"checkpoint-{i:05}.pt")
    monkeypatch.setattr(credit, "PROMPTS", 2)
    rolls = {}
    monkeypatch.setattr(page, "choose", lambda found: rolls.update(found) or [("any", i, 9) for i in found])
    data = page.gather(tmp_path)
    assert [*rolls] == [r["stage"] for r in data["responses"]] == [0, 10, 20]
    roll, r = rolls[10], data["responses"][1]
    T = len(r["ids"])
    assert [r["ids"], "".join(r["pieces"])] == [roll.ids[9, :T].tolist(), roll.texts[9]]
    assert r["group"] == roll.outcome()[8:16].tolist() and r["seat"] == 1
    scored = train_small.score_all(config, policy, None, critic, roll)
    for name, x in dict(values=scored.values, entropy=scored.entropy, old_log_probs=scored.log_probs).items():
        torch.testing.assert_close(torch.tensor(r[name]), x[9, :T], rtol=1e-5, atol=1e-5)
    assert [each["log_probs"] == each["old_log_probs"] for each in data["responses"]] == [True, False, True]
    # The contrasts are train_small's: a blank image is the same for all seeds.
    for config.contrast, other in (("blank", "on_perception"), ("blind", "-on_image")):
        plan = train_small.draw_plan(config, roll)._replace(seed=0)
        weights, _ = train_small.weigh_roles(config, policy, processor, roll, scored, roll.outcome(), plan)
        code = f"weights = role_weights(torch.where(perception, on_image, {other}), perception, reasoning)"
        torch.testing.assert_close(run(code, r)["weights"].float()[0], weights[9, :T], rtol=1e-4, atol=1e-4)
    (tmp_path / "critic.pt").unlink()
    with pytest.raises(ValueError, match="expected one on the toy world, with a critic"):
        page.gather(tmp_path)


# ----------------------------------------------------------------------------------------------- in a browser
class Browser:
    """Chromium, spoken to in the DevTools protocol: JSON through two pipes, with a 0 behind each message."""

    def __init__(self, folder):
        theirs, self.to, self.of, back = *os.pipe(), *os.pipe()
        flags = "--headless --no-sandbox --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {CHROMIUM} {flags} --user-data-dir={folder} 3<&{theirs} 4>&{back}"],
            pass_fds=(theirs, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(back)
        self.buffer, self.errors, self.tab, self.sent = b"", [], {}, 0
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.tab = self("Target.attachToTarget", targetId=target, flatten=True)
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.sent += 1
        message = dict(id=self.sent, method=method, params=params) | self.tab
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.of], [], [], 30)[0], f"no answer to {method}"
                chunk = os.read(self.of, 1 << 20)
                assert chunk, f"the browser ended at {method}"
                self.buffer += chunk
            text, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]
            if answer["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.errors.append(answer["params"])

    def js(self, expression):
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path, width=1280, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=path.as_uri())
        self.js("new Promise(done => document.readyState === 'complete' ? done() : onload = done)")

    def press(self, key):
        code = dict(Tab=9, Escape=27, End=35, Home=36).get(key) or 37 + "LURD".index(key[5])  # of an arrow
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.terminate(), browser.process.wait()


@pytest.fixture
def browser(chromium):
    chromium.open(PAGE)
    yield chromium
    errors, chromium.errors = chromium.errors, []
    assert not errors


def run(code, r):
    """The page's lines of Python on a response's figures: all (G, T), its group being as many copies."""
    T, G = len(r["ids"]), len(r["group"])
    given = {name: torch.tensor(r[name], dtype=torch.float64).expand(G, T) for name in FIGURES}
    given |= {name: given[name].bool() for name in ("perception", "reasoning")} | vars(sapo) | vars(srpo)
    given |= dict(mask=torch.ones(G, T), token_ids=torch.tensor(r["ids"]).expand(G, T), group_size=G,
                  rewards=torch.tensor([0.0] * (T - 1) + [r["group"][r["seat"]]]).expand(G, T),
                  outcome=torch.tensor(r["group"]))
    exec(code, given)
    return given


def expected(r, knobs, code):
    """What sapo.py and srpo.py say of a response: method → name → (T,). code: the page's lines, of both."""
    x, y = (run(lines, r) for lines in code)
    mask, tokens = x["mask"], sapo.ends_every_token(x["mask"])

    def gae(ends, lam, **more):
        found = sapo.segment_gae(x["rewards"], x["values"], ends, mask, knobs["gamma"], lam, **more)
        return dict(advantages=found[0], returns=found[1])

    ratio = dict(ratio=sapo.segment_ratio(x["log_probs"], x["old_log_probs"], tokens, mask))
    each = ratio | dict(v=x["values"], delta=gae(tokens, 0.0)["advantages"])
    delta = gae(x["ends"], 0.0, value_at=knobs["value_at"])["advantages"]
    alike = srpo.group_advantages(x["outcome"], len(mask))
    found = {"GRPO": ratio | dict(advantages=srpo.srpo_advantages(alike, mask)),
             "SRPO": ratio | {name: y[name] for name in ("advantages", "weights", "contrasts")},
             "PPO": each | gae(tokens, 0.95), "VC-PPO": each | gae(tokens, 0.99, lam_returns=1.0),
             "SAPO": dict({name: x[name] for name in ("advantages", "returns", "ratio")}, delta=delta,
                          v=x["returns"] - x["advantages"])}
    return x["ends"][0].tolist(), {method: {name: values[r["seat"]] for name, values in names.items()}
                                   for method, names in found.items()}


TURN = """(settings => settings.map((values, i) => {
  fixed.checked = i % 2; turn(values);
  const t = Math.floor(response.ids.length * values.clip), texts = xs => [...xs].map(x => x.textContent);
  show({t, method: "SRPO"});
  return {shown, t, scale: find("scale").textContent, code: texts([find("sapo"), find("srpo")]),
          table: [...readout.querySelectorAll("tr")].slice(1).map(x => [x.dataset.name, texts(x.cells)]),
          drawn: METHODS.map(m => cells[m][t]).map(({style, classList}) =>
            style.getPropertyValue("--size") * (classList.contains("negative") ? -1 : 1)),
          ends: cells.SAPO.map(x => x.matches(".end")), reads: cells.V.map(x => x.matches(".read"))};
}))"""
STEP = """(() => {
  const visible = pseudo => ({firstChild}) => getComputedStyle(firstChild, pseudo).visibility === "visible";
  const coloured = cell => getComputedStyle(cell).backgroundColor !== "rgba(0, 0, 0, 0)";
  return [[cells.V.map(visible("::before")), cells.D.map(visible("")), cells.SAPO.map(coloured)],
          [...steps.querySelectorAll("td:nth-child(2), td:nth-child(3)")].map(x => x.textContent.slice(2)),
          [...walks].map(button => button.ariaDisabled), steps.querySelector("table").ariaLive];
})()"""
CONTRAST = """known = {}, light = colour => known[colour] ??= (  // Y of XYZ, the luminance
  find("image").style.color = `color-mix(in xyz, ${colour}, ${colour})`,
  0.05 + parseFloat(getComputedStyle(find("image")).color.split(" ")[2]));
[0, 2, 4, 6, 8, 10].flatMap(i => (choose(i), [...plot.querySelectorAll(".token")].map(cell => {
  const {color, backgroundColor} = getComputedStyle(cell), both = [light(color), light(backgroundColor)];
  return Math.max(...both) / Math.min(...both);
})))"""
IN_SIGHT = """[...plot.children].every(table => (table.scrollIntoView(),
  [table.rows[5].cells[1], ...document.querySelectorAll("[type=range]"), ...innerWidth > 1000 ? [] : walks]
    .every(element => {
      const {x, y, width, height} = element.getBoundingClientRect();
      return element.contains(document.elementFromPoint(x + width / 2, y + height / 2));
    })))"""
CUT = """[...document.querySelectorAll("select")].filter(({style, offsetWidth}, i, all) =>
  (style.cssText = "width: max-content; max-width: none", all[i].offsetWidth > offsetWidth)).length"""


def test_the_numbers_are_those_of_sapo_and_srpo(browser, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # as in the page: fp32 is up to 1e-6 off
    rng = random.Random(0)
    for i, r in enumerate(page.data_of(PAGE)["responses"]):
        browser.js(f"turn(OURS), choose({i}), delta = shown.methods.SAPO.delta")
        assert browser.js("delta[here.t] === Math.min(...delta)") or "slip" not in r["kind"]  # of the digit
        settings = [{name: rng.choice(values) for name, values in KNOBS.items()} for _ in range(5)]
        settings[0] |= dict(ends="entropy", k=30, value_at="start")
        for n, (knobs, seen) in enumerate(zip(settings, browser.js(f"{TURN}({json.dumps(settings)})"))):
            ends, methods = expected(r, knobs, seen["code"])
            assert seen["shown"]["ends"] == seen["ends"] == ends, knobs
            assert seen["reads"] == ([True, *ends[:-1]] if knobs["value_at"] == "start" else ends)
            scale = 1 if n % 2 else max(float(x["advantages"].abs().max()) for x in methods.values())
            assert seen["scale"] == ("Â ≤ −10≥ 1" if n % 2 else f"Â −{scale:.2f}0{scale:.2f}")
            for m, (method, values) in enumerate(methods.items()):
                found = {name: torch.tensor(x, dtype=torch.double)
                         for name, x in seen["shown"]["methods"][method].items() if name != "reads"}
                torch.testing.assert_close(found, values, rtol=0, atol=1e-9, check_dtype=False)
                for name, (_, *texts) in seen["table"]:  # what one reads is what was worked out
                    x, text = values.get(name), texts[m].replace("−", "-")
                    assert text == "–" if x is None else abs(float(text) - x[seen["t"]]) < 6e-4
                assert abs(seen["drawn"][m] - values["advantages"][seen["t"]].div(scale).clamp(-1, 1)) < 1e-6


def test_every_knob_and_every_token_is_reached_by_keyboard(browser):
    browser.js("choice.focus()")
    browser.press("ArrowDown")
    assert browser.js("data.responses.indexOf(response)") == 5
    slip, last = browser.js("response.false[0].tokens[1]"), browser.js("response.ids.length - 1")
    state = ("[JSON.stringify(settings()), JSON.stringify(shown), plot.innerHTML]"
             ".concat(['sapo', 'srpo'].map(id => find(id).textContent))")
    moved = set()
    for _ in range(15):
        browser.press("Tab")
        name = browser.js("document.activeElement.name || document.activeElement.className")
        if name.startswith("token"):
            assert browser.js("here") == dict(t=slip, method="SAPO")
            for key, t, method in (("Home", 0, "SAPO"), ("ArrowLeft", 0, "SAPO"), ("ArrowRight", 1, "SAPO"),
                                   ("ArrowUp", 1, "VC-PPO"), ("ArrowDown", 1, "SAPO"), ("End", last, "SAPO")):
                browser.press(key)
                found = browser.js("[here, document.activeElement === cells[here.method][here.t]]")
                assert found == [dict(t=t, method=method), True]
                assert f"Token {t + 1} of" in browser.js("document.querySelector('summary').textContent")
        elif name in KNOBS:
            before = browser.js(state)
            browser.press("ArrowDown" if name in ("ends", "value_at", "contrast", "gamma") else "ArrowRight")
            same = [old == new for old, new in zip(before, browser.js(state))]
            assert sum(same) == 1 and same[3 if name in ("contrast", "clip", "temperature") else 4], name
            moved.add(name)
            browser.js("turn(OURS)")
    assert moved == {*KNOBS}


def test_the_buttons_do_what_they_say(browser):
    pressed = "[...buttons].filter(b => b.ariaPressed === 'true').map(b => b.textContent)"
    blamed = "shown.methods.SAPO.advantages[response.false[0].tokens[0]] < -0.6"
    assert browser.js(f"[{pressed}, {blamed}]") == [["Ours"], True]
    for button, claim in {
            "Paper": "settings().lam === 0.99",
            "λ to 1": "SAPO.advantages.every((a, t) => Math.abs(a + SAPO.v[t]) < 1e-9)",  # the reward is 0
            "λ to 0": "SAPO.advantages.every((a, t) => a === SAPO.delta[t])",
            "every token, λ 0.95": "SAPO.advantages.every((a, t) => a === PPO.advantages[t])",
            "the last token only": "new Set(SAPO.advantages).size === 1",
            "newlines, V before the last token": "SAPO.advantages[response.false[0].tokens[0]] > -0.1",
            "clip to 0.05": "SRPO.advantages.every((a, t) => Math.abs(a / GRPO.advantages[t] - 1) < 0.1)",
            "Ours": "settings().lam === 0.9 && settings().ends === 'entropy'"}.items():
        browser.js(f"[...buttons].find(b => b.textContent === {button!r}).click()")
        assert browser.js(pressed) == [button]
        assert browser.js(f"(({{SAPO, PPO, SRPO, GRPO}}) => {claim})(shown.methods)"), button


def test_the_arrow_keys_build_the_advantages_up_from_the_last_segment(browser):
    for more in (dict(), dict(ends="newline", gamma=0.9, lam=0.5, value_at="last")):
        browser.js(f"walk('Escape'), turn({{...OURS, ...{json.dumps(more)}}}), document.activeElement.blur()")
        r, ends, now = browser.js("[response, shown.ends, settings()]")
        lasts, ahead, a = [t for t, end in enumerate(ends) if end], r["group"][r["seat"]], 0.0
        firsts = [0, *(t + 1 for t in lasts[:-1])]
        for first, last in reversed([*zip(firsts, lasts)]):
            v = r["values"][first if now["value_at"] == "start" else last]
            delta, ahead = ahead - v, now["gamma"] * v  # Eq. 6
            a = delta + now["gamma"] * now["lam"] * a  # Eq. 7
            browser.press("ArrowLeft")
            drawn, said, off, live = browser.js(STEP)
            said = [eval(x.replace("−", "-").replace("·", "*")) for x in said if x]  # also what it is made of
            assert said == pytest.approx([delta, delta, a, a][:len(said)], abs=2e-3)
            assert drawn == [[t >= first for t in range(len(ends))]] * 3 and live == "polite"
            assert off == [str(first == end).lower() for end in (0, firsts[-1], None)]
        browser.js("cells.GRPO[0].focus()")  # while one steps, the keys step from a token too
        for key, first in (("ArrowRight", firsts[1]), ("Escape", 0)):
            browser.press(key)
            assert browser.js(STEP)[0] == [[t >= first for t in range(len(ends))]] * 3
        assert browser.js(f"walks[0].click(), {STEP}")[0] == [[t >= firsts[-1] for t in range(len(ends))]] * 3


@pytest.mark.parametrize("width", [1280, 400])
def test_it_looks_right_on_a_desk_and_on_a_telephone_by_day_and_by_night(browser, width):
    for dark in (False, True):
        browser.open(PAGE, width, dark)
        looks = browser.js("[getComputedStyle(document.body).backgroundColor, find('readout').open]")
        assert looks == ["rgb(21, 23, 26)" if dark else "rgb(252, 252, 250)", width > 1000]
        assert browser.js("document.documentElement.scrollWidth") == width  # nothing hangs over the edge
        assert browser.js("plot.scrollWidth <= plot.clientWidth") and browser.js(IN_SIGHT)
        if width > 1000:  # the colours are the same on a telephone
            assert min(browser.js(CONTRAST)) > 4.4
    browser.js("turn({...OURS, ends: 'token', gamma: 0.95}), bar = document.querySelector('aside')")
    assert browser.js("response.ids.every(() => (walk('ArrowLeft'), bar.scrollWidth <= bar.clientWidth))")
    assert browser.js(f"find('all').checked = true, {CUT}") == 0


def test_hostile_text_is_shown_and_runs_nothing(browser, tmp_path):
    data = page.data_of(PAGE)
    evil = ["</script><script>hacked = 1</script>", '"><img src=x onerror="hacked = 1">', "<!--<script>",
            "{{data}}{{digest}}", "'`${hacked = 1}\\", "\u2028\u202e", "&lt;", "x" * 3000, "", "\n"]
    r, large, *_ = data["responses"]
    r |= dict.fromkeys(("question", "answer", "stated", "cells", "kind"), "".join(evil))
    r |= dict(image="javascript:hacked = 1", pieces=(evil * 10)[:len(r["pieces"])],
              false=[dict(kind=evil[0], text="".join(evil), tokens=[0, 1, 2])])
    large["pieces"][0] = "<" * 2**20  # a megabyte, and six of them once escaped
    path = tmp_path / "hostile.html"
    path.write_text(page.render(data | dict(responses=[r, large, data["responses"][2]])), encoding="utf-8")
    assert path.stat().st_size < 1e6
    browser.open(path)
    found = browser.js("choose(0), cells.SAPO.map(cell => cell.textContent)")
    assert len(found) == len(r["pieces"]) and found[3] == "{{data}}{{digest}}"
    assert [x[:8] for x in found[:3]] == [x[:8] for x in evil[:3]] and max(map(len, found)) < 30
    found = "[data.responses.length, response.pieces[0], typeof hacked, document.images.length]"
    assert browser.js(found) == [2, evil[0], "undefined", 1] and browser.js("document.scripts.length") == 2
    browser.errors.clear()  # the refused image
    with pytest.raises(ValueError, match="expected at least one"):
        page.render(data | dict(responses=[large]))
