"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const tip = document.getElementById("tip");
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  const place = (x, top, bottom) => {
    tip.hidden = false;
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(x, width - tip.offsetWidth - 8));
    const below = bottom + 8 + tip.offsetHeight < window.innerHeight;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(below ? bottom + 8 : Math.max(4, top - tip.offsetHeight - 8)) + window.scrollY}px`;
  };
  const hide = () => { tip.hidden = true; };

  const showValue = (_, event, __, value) => {
    if (value === null || value === undefined || value === "") return hide();
    tip.replaceChildren();
    if (typeof value === "object") {
      for (const [name, text] of Object.entries(value)) {
        const line = make("p");
        line.append(make("span", `${name} `, "quiet"), make("span", String(text)));
        tip.append(line);
      }
    } else tip.append(make("p", String(value)));
    place(event.clientX + 12, event.clientY, event.clientY);
  };

  const charts = read("charts");
  const options = { mode: "vega", renderer: "svg", actions: false, tooltip: showValue };
  const drawing = [...document.querySelectorAll("[data-chart]")].map((element) =>
    vegaEmbed(element, charts[element.dataset.chart], options));
  Promise.all(drawing).then(() => {
    document.documentElement.dataset.charts = "drawn";
  });

  const samples = read("samples");
  const meaning = {
    same: "Same: both next tokens end at the same byte.",
    coarser: "Coarser: the source's next token goes on beyond the pivot's.",
    finer: "Finer: the source's next token ends before the pivot's.",
    none: "None: the source has no boundary here, so it says nothing about this token.",
  };
  const seen = (text) => text.replaceAll(" ", "·");
  const column = (title, token, absent) => {
    const side = make("div");
    side.append(make("h4", title));
    if (!token) {
      side.append(make("p", absent, "quiet"));
      return side;
    }
    const list = make("ol");
    let found = false;
    const line = (text, p, gold) => {
      const item = make("li", undefined, gold ? "gold" : "");
      item.append(make("span", (gold ? "▸ " : "") + seen(text), "mono"), make("span", p === null ? "n/a" : p.toFixed(3)));
      list.append(item);
    };
    for (const [text, p] of token.top) {
      const gold = !found && text === token.text;
      found = found || gold;
      line(text, p, gold);
    }
    if (!found) line(token.text, token.p, true);
    side.append(list);
    return side;
  };

  const explain = (button, token) => {
    const [sample, n] = button.dataset.seg.split(".").map(Number);
    const { pivot, source } = samples[sample].segments[n];
    const theirs = token && token.parentElement.classList.contains("theirs");
    const at = token ? [...token.parentElement.children].indexOf(token) : 0;
    // The two sides share a boundary where the segment begins, and nowhere inside it.
    const ours = theirs ? (at === 0 ? pivot[0] : undefined) : pivot[at];
    const other = theirs ? source[at] : at === 0 ? source[0] : undefined;
    tip.replaceChildren(make("p", ours ? meaning[ours.kind] : "The pivot has no boundary here."));
    const columns = make("div", undefined, "cols");
    columns.append(column("pivot expects", ours, "no boundary here"), column("source expects", other, "no boundary here"));
    tip.append(columns);
    const box = (token || button).getBoundingClientRect();
    place(box.left, box.top, box.bottom);
  };

  for (const list of document.querySelectorAll(".tokens")) {
    list.addEventListener("mouseover", (event) => {
      const button = event.target.closest(".seg");
      if (button) explain(button, event.target.closest(".tok"));
    });
    list.addEventListener("mouseleave", hide);
    list.addEventListener("focusin", (event) => explain(event.target, null));
    list.addEventListener("focusout", hide);
    list.addEventListener("click", (event) => {
      const button = event.target.closest(".seg");
      if (button) explain(button, event.target.closest(".tok"));
    });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const all = [...list.querySelectorAll(".seg")];
      const from = all.indexOf(event.target);
      const to = all[Math.max(0, Math.min(all.length - 1, from + step))];
      event.target.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  let shut = [];
  window.addEventListener("beforeprint", () => {
    shut = [...document.querySelectorAll("details:not([open])")];
    for (const element of shut) element.open = true;
  });
  window.addEventListener("afterprint", () => { for (const element of shut) element.open = false; });
})();
