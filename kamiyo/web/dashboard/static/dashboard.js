// The little that the pages cannot do without a script: look again by themselves, copy, fold, and keep "3 min ago" true.
(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("js");
  const say = (words) => { document.getElementById("said").textContent = words; };

  // ── Live: the page is asked for its live part, and what comes back takes the old one's place ──
  let timer = 0, paused = false, misses = 0;
  const live = () => document.getElementById("live");

  const wait = () => {
    clearTimeout(timer);
    const every = Number(live().dataset.live);
    if (every && !paused && !document.hidden) timer = setTimeout(look, every * 1000 * Math.min(2 ** misses, 12));
  };

  const busy = () => {
    const chosen = getSelection();
    return (chosen && !chosen.isCollapsed && live().contains(chosen.anchorNode)) ||
      live().querySelector("input:focus, select:focus, figure.pointed") !== null;
  };

  async function look() {
    if (busy()) return wait();
    try {
      const answer = await fetch(location.href, { headers: { "X-Fragment": "live" }, cache: "no-store" });
      if (answer.status === 401) return location.reload();
      if (!answer.ok) throw new Error(answer.status);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("live");
      if (page && !busy() && !paused) replace(page);
      misses = 0;
    } catch {
      misses += 1;
    }
    stale();
    wait();
  }

  // What a person opened stays open, what has the focus keeps it.
  function replace(page) {
    const was = live(), open = [...was.querySelectorAll("details")].map((one) => one.open);
    const all = "a, button, summary, [tabindex]";
    const place = [...was.querySelectorAll(all)].indexOf(document.activeElement);
    const scrolled = [...was.querySelectorAll(".scroll, pre")].map((one) => [one.scrollTop, one.scrollLeft]);
    const folds = [...page.querySelectorAll("details")];
    if (folds.length === open.length) folds.forEach((one, index) => { one.open = open[index]; });
    was.replaceWith(page);
    const dead = document.getElementById("dead");
    if (dead) {
      dead.textContent = page.dataset.dead;
      dead.parentElement.hidden = page.dataset.dead === "0";
    }
    [...page.querySelectorAll(".scroll, pre")].forEach((one, index) => {
      if (scrolled[index]) [one.scrollTop, one.scrollLeft] = scrolled[index];
    });
    if (place >= 0) page.querySelectorAll(all)[place]?.focus({ preventScroll: true });
    showPause();
  }

  function stale() { root.classList.toggle("stale", misses > 1); words(); }
  function words() {
    const pulse = document.querySelector(".pulse-words");
    if (pulse) pulse.textContent = paused ? "Paused" : misses > 1 ? "No answer, still asking" : "Live";
  }
  function showPause() {
    const button = document.querySelector(".pause");
    if (button) button.textContent = paused ? "Resume" : "Pause";
    root.classList.toggle("paused", paused);
    words();
  }
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : look()));

  // ── What can be pressed ──
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.matches(".pause")) {
      paused = !paused;
      clearTimeout(timer);
      showPause();
      if (!paused) look();
    } else if (button.dataset.copy !== undefined) {
      const done = await copy(button);
      button.textContent = done ? "Copied" : "Press Ctrl+C";
      say(done ? "Copied" : "Selected; press Ctrl+C to copy");
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } else if (button.dataset.fold !== undefined) {
      document.querySelectorAll(".tree details").forEach((one) => { one.open = button.dataset.fold === "open"; });
    }
  });

  async function copy(button) {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      return true;
    } catch { // no clipboard without https
      getSelection().selectAllChildren(button.previousElementSibling);
      return false;
    }
  }

  // One press is enough.
  document.addEventListener("submit", (event) => {
    if (event.target.method !== "post") return;
    if (event.target.dataset.sent) event.preventDefault();
    event.target.dataset.sent = "yes";
  });
  addEventListener("pageshow", () => document.querySelectorAll("form[data-sent]").forEach((one) => delete one.dataset.sent));

  // ── The value under the pointer, beside the picture's title ──
  function point(event) {
    const hit = event.target.closest?.(".hit"), figure = event.target.closest?.(".picture");
    document.querySelectorAll(".picture.pointed").forEach((other) => {
      if (other === figure && hit) return;
      const words = other.querySelector(".words");
      words.textContent = words.dataset.words;
      other.classList.remove("pointed");
    });
    if (!hit || !figure) return;
    figure.classList.add("pointed");
    figure.querySelector(".words").textContent = hit.textContent;
  }
  document.addEventListener("pointermove", point);
  document.addEventListener("pointerdown", point);
  document.addEventListener("pointerleave", point);

  // ── "3 min ago" stays true: the same words as wording.relative ──
  function relative(seconds) {
    const size = Math.abs(seconds);
    if (size < 1) return "now";
    const text = size < 60 ? `${Math.round(size)} s` : size < 5400 ? `${Math.round(size / 60)} min`
      : size < 129600 ? `${Math.round(size / 3600)} h` : `${Math.round(size / 86400)} d`;
    return seconds > 0 ? `${text} ago` : `in ${text}`;
  }
  setInterval(() => {
    if (document.hidden || paused) return;
    document.querySelectorAll("time[data-rel]").forEach((one) => {
      const words = relative((Date.now() - Date.parse(one.dateTime)) / 1000);
      if (one.textContent !== words) one.textContent = words;
    });
  }, 5000);

  showPause();
  wait();
})();
