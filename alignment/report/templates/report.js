"use strict";
(() => {
  const valueOf = (group, column) => {
    const row = group.tagName === "TBODY" ? group.rows[0] : group;
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value;
  };

  // A table sorts by any column, and where a toolbar stands before it, filters by words, status and fields.
  const enhance = (table) => {
    const bodies = [...table.tBodies];
    const groups = bodies.length > 1 ? bodies : [...(bodies[0] ? bodies[0].rows : [])];
    if (!groups.length) return;
    const parent = groups[0].parentElement;
    const heads = [...table.tHead.rows[0].cells];
    const filtered = table.closest(".filtered");
    const toolbar = filtered && filtered.querySelector(".toolbar");
    const sortChoice = toolbar && toolbar.querySelector(".sort-choice select");

    const sortBy = (column, descending) => {
      const numeric = heads[column].dataset.type === "number";
      const sorted = [...groups].sort((a, b) => {
        const [left, right] = [valueOf(a, column), valueOf(b, column)];
        if (left === "" || right === "") return (left === "") - (right === "");
        const order = numeric ? parseFloat(left) - parseFloat(right) : left.localeCompare(right, "en", { numeric: true });
        return (descending ? -order : order) || groups.indexOf(a) - groups.indexOf(b);
      });
      sorted.forEach((group) => parent.append(group));
      heads.forEach((head, index) => {
        if (index === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      if (sortChoice) sortChoice.value = String(column);
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sortBy(column, head.getAttribute("aria-sort") === "ascending"));
      if (sortChoice) sortChoice.add(new Option(head.dataset.long || button.textContent.trim(), String(column)));
    });
    if (!toolbar) return;

    const search = toolbar.querySelector("input");
    const statuses = [...toolbar.querySelectorAll("[data-choice]")];
    const selects = [...toolbar.querySelectorAll("select[data-field]")];
    const shown = toolbar.querySelector(".shown");
    const noun = filtered.dataset.noun;
    const many = noun + (noun.endsWith("x") ? "es" : "s");
    const texts = groups.map((group) => group.textContent.toLowerCase());
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const pressed = statuses.find((button) => button.getAttribute("aria-pressed") === "true");
      const status = pressed ? pressed.dataset.choice : "";
      let count = 0;
      groups.forEach((group, index) => {
        const visible = words.every((word) => texts[index].includes(word))
          && (!status || group.dataset.status === status)
          && selects.every((select) => !select.value || group.dataset[select.dataset.field] === select.value);
        group.hidden = !visible;
        count += visible;
      });
      shown.textContent = `${count} of ${groups.length} ${groups.length === 1 ? noun : many}`;
    };
    if (sortChoice) sortChoice.addEventListener("change", () => sortBy(Number(sortChoice.value), false));
    statuses.forEach((button) => button.addEventListener("click", () => {
      statuses.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      filter();
    }));
    selects.forEach((select) => {
      [...new Set(groups.map((group) => group.dataset[select.dataset.field]))].sort()
        .forEach((value) => select.add(new Option(value, value)));
      select.parentElement.hidden = select.options.length < 3;
      select.addEventListener("change", filter);
    });
    search.addEventListener("input", filter);
    toolbar.hidden = false;
    filter();
  };
  document.querySelectorAll("table.sortable").forEach(enhance);

  // A link to a case opens it, and whatever it is folded into.
  const reveal = () => {
    let name = location.hash.slice(1);
    try { name = decodeURIComponent(name); } catch { /* what is no escape stands for itself */ }
    const target = name && document.getElementById(name);
    if (!target) return;
    const own = target.querySelector(":scope > details");
    if (own) own.open = true;
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link && link.hash === location.hash) reveal();
  });
  reveal();

  const fold = document.querySelector(".fold");
  if (fold) {
    const cases = [...document.querySelectorAll(".case > details")];
    fold.hidden = !cases.length;
    fold.addEventListener("click", () => {
      const open = fold.getAttribute("aria-pressed") !== "true";
      cases.forEach((details) => { details.open = open; });
      fold.setAttribute("aria-pressed", String(open));
    });
  }
  document.documentElement.dataset.script = "ran";
})();
