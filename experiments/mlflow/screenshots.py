"""Make a small sweep of the pocket model in a temporary store, open it in MLflow's UI, and photograph three answers.

    uv run --with selenium python experiments/mlflow/screenshots.py            # sweep (minutes) and pictures
    uv run --with selenium python experiments/mlflow/screenshots.py --store sqlite:////PATH/TO/mlflow.db

Needs Chromium and its driver (Debian: ``apt install chromium chromium-driver``) and selenium; none is a dependency of
the project. Written for MLflow 3.17: another version may name what is clicked differently.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow.tracking import MlflowClient
from PIL import Image

EXPERIMENT = "spaces"
SWEEP = (
    "model.name_or_path=pocket,pocket/shallow space=dop,dop_split,uniform budget=[0.5,0.3,0.2] "
    f"data.num_samples=24 data.num_heldout=24 data.num_test=0 eval=none tracking.experiment={EXPERIMENT}"
)
BUDGET = 0.3
SIDEBAR, WIDTH = 198, 1600
MAX_WAIT_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="SQLite store of an earlier sweep with this script's command")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    tools = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if importlib.util.find_spec("selenium") is None or None in tools.values():
        sys.exit(
            "screenshots need selenium (`uv run --with selenium …`), chromium and chromedriver "
            f"(`apt install chromium chromium-driver`); found {tools}"
        )
    with tempfile.TemporaryDirectory() as folder:
        store = args.store or sweep(Path(folder))
        with ui(store, Path(folder)) as address, browser(tools) as driver:
            args.out.mkdir(parents=True, exist_ok=True)
            photograph(MlflowClient(store), driver, address, args.out)


def sweep(folder: Path) -> str:
    """Six searches in one experiment; the store's URI."""
    command = [sys.executable, "-m", "dop_search.app.cli.search", "-m", *SWEEP.split()]
    subprocess.run(command, cwd=folder, check=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


@contextmanager
def ui(store: str, folder: Path) -> Iterator[str]:
    """``mlflow ui`` on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "ui.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: server.poll() is not None or is_up(address), f"mlflow ui at {address}")
        if server.poll() is not None:
            sys.exit(f"mlflow ui ended with status {server.returncode}:\n{(folder / 'ui.log').read_text()}")
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # the server has workers
        server.wait(timeout=30)


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


def wait_for(is_true: Any, what: str) -> None:
    end = time.monotonic() + MAX_WAIT_S
    while not is_true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} was not there after {MAX_WAIT_S:g} s")
        time.sleep(0.5)


@contextmanager
def browser(tools: dict[str, str | None]) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(tools["chromium"])
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(tools["chromedriver"])))
    try:
        yield driver
    finally:
        driver.quit()


def photograph(client: MlflowClient, driver: Any, address: str, out: Path) -> None:
    """The three pictures."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        sys.exit(f"the store has no experiment {EXPERIMENT!r}; make it by: dop-search -m {SWEEP}")
    number = experiment.experiment_id
    runs = f"{address}/#/experiments/{number}/runs?workflowType=machine_learning"

    show(driver, f"{runs}&viewStateShareKey=strategies", "uniform_kl_held", height=820)  # what a run prints
    save(driver, out / "best_under_budget.png")

    query = quote("metrics.floor_ratio > 0 and params.space = 'dop_split'")
    show(driver, f"{runs}&compareRunsMode=CHART&searchFilter={query}", "curve/q_depth", height=1100)
    save(driver, out / "curves_of_two_models.png")

    found = "params.model = 'pocket' and params.budget = '{}' and params.space = '{}'"
    pair = [
        client.search_runs([number], found.format(BUDGET, space))[0].info.run_id for space in ("uniform", "dop_split")
    ]
    chosen = f"runs={quote(json.dumps(pair))}&experiments={quote(json.dumps([number]))}"
    show(driver, f"{address}/#/compare-runs?{chosen}", "Metrics - Show diff only", height=1500)
    for section in ("Parameters", "Metrics"):
        click(driver, f"//button[@aria-label='{section} - Show diff only']")
    for section in ("Visualizations", "Run details"):
        click(driver, f"//*[text()='{section}']")
    driver.execute_script("arguments[0].scrollIntoView()", driver.find_element("xpath", "//*[text()='Parameters']"))
    save(driver, out / "what_changed.png")


def show(driver: Any, url: str, text: str, height: int) -> None:
    """Open a page, wait for a text on it, close what lies over it."""
    from selenium.webdriver.common.by import By

    driver.set_window_size(SIDEBAR + WIDTH, height)
    driver.get("about:blank")
    driver.get(url)
    wait_for(lambda: text in driver.page_source, f"{text!r} at {url}")
    for name in ("mlflow.assistant.chat_panel.close", "mlflow.experiment_page.shared_view.dismiss"):
        for button in driver.find_elements(By.CSS_SELECTOR, f"[data-component-id='{name}']"):
            button.click()
    style = "document.head.insertAdjacentHTML('beforeend', '<style>.modebar{display:none!important}</style>')"
    driver.execute_script(style)
    time.sleep(4)  # charts are drawn after the text is there


def click(driver: Any, xpath: str) -> None:
    from selenium.webdriver.common.by import By

    element = driver.find_element(By.XPATH, xpath)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()
    time.sleep(1)


def save(driver: Any, path: Path) -> None:
    """The window without the sidebar, in few colours."""
    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    image.crop((SIDEBAR, 0, image.width, image.height)).quantize(96).save(path, optimize=True)
    print(path, path.stat().st_size // 1000, "kB")


if __name__ == "__main__":
    main()
