"""The report's views say everything that its data holds, and a saved report comes back as it was."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter import render
from rewriter.load import load_report, report_from_dict
from rewriter.report import CheckResult, Fallback, GraphBreak, NearMiss, OnDemand, RegionReport, Rewrite, RewriteReport
from rewriter.sections import NOTHING
from rewriter.sites import compress, compressed

VIEWS = (render.text, render.markdown, render.html)
BLOCKS = tuple(f"model.layers.{i}" for i in range(28))


def norm(sites, old=6e-8, new=6.5e-8, **changes):
    checks = (CheckResult("output 0", "float32", old, new), CheckResult("gradient of x", "float32", 1e-9, 1e-9))
    return Rewrite(**{"pattern": "rms_norm", "sites": tuple(sites), "replacement": "fused_rms_norm", "operators": 8,
                      "details": {"weight": "plain"}, "verified": checks, **changes})  # fmt: skip


REPORT = RewriteReport(
    rewrites=(
        norm(f"{b}.input_layernorm" for b in BLOCKS),
        norm((f"{b}.post_attention_layernorm" for b in BLOCKS), new=1.25e-7, operators=6),
        norm(["model.norm"], verified=()),
        norm(["head", "head#2"], pattern="linear_cross_entropy", replacement="head_and_loss", details={}, lazy=True),
    ),
    near_misses=(
        NearMiss("rotary", tuple(f"{b}.self_attn" for b in BLOCKS), "cos is <b>odd</b>\n| see", "mul_3", "q = q * cos"),
        NearMiss("glu", ("",), "its intermediate result __up__ is used again", "silu", ""),
    ),
    regions=(RegionReport(BLOCKS, "block", 2, 1), RegionReport(("",), "model", 1, 0)),
    graph_breaks=(GraphBreak("call to print [red]", 3),),
    fallbacks=(Fallback("model.layers.3", "limit hit", 2), Fallback("model.layers.4", "limit hit", 2)),
    notes=("logits are <i>computed</i> on demand",),
    environment={"python": "3.12.3", "device": "x86_64"},
    on_demand=(OnDemand(("lm.head",), 32_000, 4096),),
)


def report_of(**given):
    """A report with nothing in it but `given`."""
    parts = ("rewrites", "near_misses", "regions", "graph_breaks", "fallbacks", "notes")
    return RewriteReport(**{**dict.fromkeys(parts, ()), "environment": {}, **given})


EMPTY = report_of(environment={"python": "3.12.3"})


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ([], []),
        (["a.0.x", "a.1.x", "a.3.x"], ["a.{0,1,3}.x"]),
        ([f"h.{i}" for i in range(28)], ["h.{0..27}"]),
        ([f"h.{i}.n" for i in (0, 1, 2, 5, 7, 8)], ["h.{0..2,5,7,8}.n"]),
        ([f"h.{i}.n" for i in range(1, 28, 2)], ["h.{1..27..2}.n"]),
        ([f"h.{i}.e.{j}.w" for i in range(3) for j in range(4)], ["h.{0..2}.e.{0..3}.w"]),
        (["h.0.e.0", "h.0.e.1", "h.1.e.0"], ["h.0.e.{0,1}", "h.1.e.0"]),
        (["h.0.n", "h.1.n", "h.0.n#2", "h.1.n#2"], ["h.{0,1}.n", "h.{0,1}.n#2"]),
        (["h.0", "h.1", "h.0#2", "h.1#2"], ["h.{0,1}", "h.{0,1}#2"]),
        (["encoder.norm", "decoder.norm", "", "encoder.norm"], ["encoder.norm", "decoder.norm", ""]),
        (["layer1.norm", "layer2.norm", "h.007", "h.7"], ["layer1.norm", "layer2.norm", "h.007", "h.7"]),
    ],
)
def test_compression(sites, expected):
    assert compress(sites) == expected


def expand(path):
    """What a shell's brace expansion makes of a compressed path."""
    parts = []
    for part in re.split(r"\{(.*?)\}", path)[1::2]:
        numbers = []
        for item in part.split(","):
            first, *rest = map(int, item.split(".."))
            numbers += range(first, rest[0] + 1, *rest[1:]) if rest else [first]
        parts.append(numbers)
    template = re.sub(r"\{.*?\}", "{}", path)
    return [template.format(*numbers) for numbers in itertools.product(*parts)]


@given(
    st.lists(
        st.lists(st.sampled_from(["h", "x#2", "0", "0#2", "1#2", "1", "2", "3", "4", "7", "10", "00"]), max_size=4)
    )
)
def test_compression_loses_and_invents_nothing(parts):
    sites = [".".join(p) for p in parts]
    lines = compressed(sites)
    expanded = [expand(path) for path, _ in lines]
    assert [len(e) for e in expanded] == [count for _, count in lines]
    assert sorted(itertools.chain(*expanded)) == sorted(set(sites))


def test_rewrites_of_a_kind_are_one_row_with_their_worst_error():
    rows = render.text(REPORT).split("Rewrites\n")[1].split("\n\n")[0]
    assert rows.count("by fused_rms_norm") == 1
    assert "model.layers.{0..27}.input_layernorm  x28" in rows
    assert "model.layers.{0..27}.post_attention_layernorm  x28" in rows
    assert "1.2e-07 (6.0e-08)" in rows and rows.count("6.5e-08") == 1  # the other kind
    assert "6-8" in rows


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_holds_everything(view):
    shown = view(REPORT)
    for expected in (
        "3.12.3", "x86_64", "rms_norm", "57", "fused_rms_norm", "weight=plain", "head#2", "on demand",
        "output 0", "rotary", "{0..27}.self_attn", "see", "mul_3", "q = q", "glu", "is used again", "silu", "block",
        "call to print", "model.layers.{3,4}", "limit hit", "on demand",
        "59 places rewritten, 1 result on demand, 29 near misses, 3 graphs compiled, 1 recompile, 3 graph breaks",
        "4 fallbacks", "lm.head", "32000 of 4096",
    ):  # fmt: skip
        assert expected in shown, expected


def test_text_is_plain_and_fits():
    shown = str(REPORT)
    assert shown == render.text(REPORT)
    assert shown.isascii() and "\x1b" not in shown
    assert all(len(line) <= render.WIDTH and line == line.rstrip() for line in shown.splitlines())
    assert "call to print [red]" in shown  # no markup of rich's


def test_text_cuts_nothing_that_is_too_wide():
    path, reason = "very_long_name." * 20 + "end", "word " * 100 + "last"
    shown = render.text(report_of(near_misses=(NearMiss("glu", (path,), reason, "n", "s"),)))
    assert shown.count("very") == 20 and shown.count("word") == 100 and "last" in shown


@pytest.mark.parametrize("view", VIEWS)
def test_an_empty_report_says_so(view):
    assert NOTHING in view(EMPTY)
    assert "Rewrites" not in view(EMPTY)


def test_a_rewrite_without_proof_says_so():
    assert "not verified" in render.text(report_of(rewrites=(norm(["n"], verified=()),)))


def test_a_missing_gradient_is_no_error():
    checks = (CheckResult("gradient of bias", "", 0.0, float("inf")), CheckResult("output 0", "float32", 1e-8, 2e-8))
    report = report_of(rewrites=(norm(["n"], verified=checks),))
    assert "2.0e-08 (1.0e-08)" in render.text(report)
    assert "no gradient in either" in render.markdown(report)


def test_markdown_is_tables_of_plain_text():
    shown = render.markdown(REPORT)
    assert "cos is &lt;b&gt;odd&lt;/b&gt;<br>\\| see" in shown
    assert "\\__up_\\_" in shown or "\\_\\_up\\_\\_" in shown
    for table in re.findall(r"(?:^\|.*\n)+", shown + "\n", re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]


def test_html_is_one_escaped_page():
    page = Page()
    page.feed(render.html(REPORT))
    assert "cos is &lt;b&gt;odd&lt;/b&gt;" in render.html(REPORT)
    assert not {"script", "link", "img", "b"} & set(page.tags)
    assert not page.links
    assert page.tags.count("table") == 9


def test_html_escapes_every_field():
    evil = "<script>alert(1)</script>"
    check = CheckResult(evil, evil, 0.0, 0.0)
    report = RewriteReport(
        (Rewrite(evil, (evil,), evil, {evil: evil}, 1, (check,)),),
        (NearMiss(evil, (evil,), evil, evil, evil),),
        (RegionReport((evil,), evil, 1, 0),),
        (GraphBreak(evil, 1),),
        (Fallback(evil, evil, 1),),
        (evil,),
        {evil: evil},
    )
    page = Page()
    page.feed(render.html(report))
    assert "script" not in page.tags
    outside_code = re.sub(r"`[^`]*`", "", render.markdown(report))
    assert "<script" not in outside_code


def test_saved_json_comes_back_equal(tmp_path):
    REPORT.save(tmp_path / "r.json")
    assert load_report(tmp_path / "r.json") == REPORT
    assert report_from_dict(REPORT.to_dict()) == REPORT
    assert json.loads(REPORT.to_json())["graphs"] == 3


def test_details_that_json_has_no_word_for_become_strings(tmp_path):
    report = report_of(rewrites=(norm(["n"], details={"dtype": float}),))
    report.save(tmp_path / "r.json")
    assert load_report(tmp_path / "r.json").rewrites[0].details == {"dtype": "<class 'float'>"}


@pytest.mark.parametrize(("ending", "view"), [("md", render.markdown), ("html", render.html), ("txt", render.text)])
def test_save_follows_the_ending(tmp_path, ending, view):
    REPORT.save(tmp_path / f"r.{ending}")
    assert (tmp_path / f"r.{ending}").read_text("utf-8") == view(REPORT) + "\n"


def test_save_refuses_another_ending(tmp_path):
    with pytest.raises(ValueError, match=r"'\.pdf'; allowed are \.json"):
        REPORT.save(tmp_path / "r.pdf")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", b"\xff\xfe", '{"rewrites": 3}', '{"rewrites": [{"pattern": "x"}]}', '{"rewrites": [1]}'],
)
def test_a_file_that_holds_no_report_is_a_value_error(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"r\.json is no report: "):
        load_report(path)


def test_reports_of_other_versions_are_readable():
    data = {**REPORT.to_dict(), "new_field": 1}
    assert report_from_dict(data) == REPORT
    del data["notes"]
    assert report_from_dict(data).rewrites == REPORT.rewrites
