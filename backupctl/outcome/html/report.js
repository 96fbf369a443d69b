// SPDX-License-Identifier: GPL-2.0-or-later
"use strict";

// Walks along the time lines, by keyboard and pointer. What it shows comes from the table below each of them.
for (const figure of document.querySelectorAll(".timeline")) {
  const table = document.getElementById(figure.dataset.table);
  const names = Array.from(table.tHead.rows[0].cells, (cell) => cell.textContent);
  const rows = Array.from(table.tBodies[0].rows).filter((row) => row.dataset.x).reverse();
  const area = figure.querySelector(".area");
  const cursor = figure.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  let chosen = rows.length - 1;

  const described = (row) =>
    Array.from(row.cells)
      .map((cell, at) => [names[at], cell.textContent])
      .filter(([, value]) => value && value !== "-")
      .map(([name, value], at) => (at ? `${name.toLowerCase()} ${value}` : value))
      .join(" · ");

  const choose = (wanted) => {
    chosen = Math.max(0, Math.min(rows.length - 1, wanted));
    const row = rows[chosen];
    const text = described(row);
    cursor.style.left = `${row.dataset.x / 10}%`;
    readout.textContent = text;
    area.setAttribute("aria-valuenow", chosen + 1);
    area.setAttribute("aria-valuetext", text);
  };

  const nearest = (event) => {
    const box = area.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 1000;
    let best = 0;
    rows.forEach((row, at) => {
      if (Math.abs(row.dataset.x - x) <= Math.abs(rows[best].dataset.x - x)) best = at;
    });
    return best;
  };

  const keys = {
    ArrowLeft: () => chosen - 1,
    ArrowDown: () => chosen - 1,
    ArrowRight: () => chosen + 1,
    ArrowUp: () => chosen + 1,
    PageDown: () => chosen - 10,
    PageUp: () => chosen + 10,
    Home: () => 0,
    End: () => rows.length - 1,
  };

  if (rows.length) {
    area.hidden = readout.hidden = false;
    area.tabIndex = 0;
    area.setAttribute("role", "slider");
    area.setAttribute("aria-label", figure.dataset.name);
    area.setAttribute("aria-valuemin", 1);
    area.setAttribute("aria-valuemax", rows.length);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        table.closest("details").open = true;
        rows[chosen].scrollIntoView({ block: "center" });
      } else if (Object.hasOwn(keys, event.key) && !event.ctrlKey && !event.altKey && !event.metaKey) {
        choose(keys[event.key]());
      } else {
        return;
      }
      event.preventDefault();
    });
    area.addEventListener("pointermove", (event) => choose(nearest(event)));
    area.addEventListener("pointerdown", (event) => choose(nearest(event)));
    choose(chosen);
  }
}

// A page that is served: what works on each VM now, every two seconds. It never loads itself anew unasked.
if (document.body.dataset.live !== undefined) {
  const line = document.querySelector(".live");
  const say = (text) => {
    if (line.textContent !== text) line.textContent = text;
    line.hidden = !text;
  };

  const show = ({ repository, vm, doing }) => {
    const part = Array.from(document.querySelectorAll(".vm")).find(
      (one) => one.dataset.vm === vm && one.dataset.repository === String(repository)
    );
    const now = part?.querySelector(".now");
    if (!now) return;
    now.hidden = !doing;
    now.lastElementChild.textContent = doing;
  };

  const update = async () => {
    try {
      const answer = await fetch("live.json", { cache: "no-store", signal: AbortSignal.timeout(10000) });
      const found = await answer.json();
      found.vms.forEach(show);
      say(found.version === document.body.dataset.live ? "" : "Points have come or gone: reload the page to see them.");
    } catch {
      say("backupctl does not answer: this page is not kept up to date any more.");
    }
    setTimeout(update, 2000);
  };
  update();
}
