import io
from pathlib import Path

from rich.console import Console

from vla_dist.cli.live import LiveView, draw, one_line
from vla_dist.evaluation.statistics import success_rate
from vla_dist.run.status import RunStatus

STATUS = RunStatus(
    preset="demo",
    run_dir=Path("runs/demo-1"),
    phase="training",
    elapsed_s=63.0,
    memory_mb=4100.0,
    rollout_episodes=210,
    rollout_episodes_wanted=400,
    collect_steps_per_s=530.0,
    steps_stored=17_000,
    episodes_stored=212,
    steps_by_source={"expert": 16_000, "policy": 1_000, "human": 0},
    samples_per_insert=2.1,
    replay_mb=31.0,
    updates=550,
    total_updates=2000,
    loss=0.0312,
    data_wait_share=0.01,
    newest_version=3,
    published={1: 0, 2: 150, 3: 400},
    rate_by_version={1: success_rate(1, 40)},
    robots_running=4,
    served_calls=1234,
    served_calls_failed=0,
    call_p50_ms=12.0,
    call_p99_ms=80.0,
    served_version=3,
    fleet_episodes=11,
    notes=("rollout-0 died and was started again (1 of at most 10)",),
)


def printed(renderable, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_the_panel_shows_every_part_of_the_loop():
    text = printed(draw(STATUS), 110)
    for words in (
        "210 of 400 rollout episodes",
        "530 steps/s",
        "17,000 steps",
        "expert 16,000, policy 1,000",
        "update 550 of 2000",
        "4 robots",
        "1,234 calls, 0 failed",
        "0.03",
        "rollout-0 died",
    ):
        assert words in text, words
    assert "human" not in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_a_log_gets_one_line_now_and_then_and_at_each_phase(capsys):
    console = Console(width=400, force_terminal=False)
    with LiveView(console) as view:
        view.show(STATUS)
        view.show(STATUS)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0] == one_line(STATUS)
