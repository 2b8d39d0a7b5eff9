// The report's rollouts: search, sort, and the group of a row. Model output goes in as text, never as HTML.
{
  const data = JSON.parse(document.getElementById("rollouts").textContent);
  const named = fields => values => Object.fromEntries(fields.map((field, place) => [field, values[place]]));
  const groups = data.groups.map(named(data.group_fields));
  const rollouts = data.rollouts.map(named(data.rollout_fields));
  const titleOf = new Map(data.items.map(([title, id]) => [id, title]));
  const PAGE = 50;

  const moved = rollout => rollout.positive_rank - rollout.positive_rank_after;  // the best-placed positive
  function outcome(rollout) {
    if (rollout.failure !== null) return "no ranking";
    return moved(rollout) > 0 ? "moved up" : moved(rollout) < 0 ? "moved down" : "stayed";
  }
  const fate = rollout => rollout.kept ? "kept" : `discarded: ${rollout.discard_reason}`;
  const number = value => value === null ? "–" : value.toFixed(3);
  const COLUMNS = [  // name, what is shown, what is sorted by
    ["step", r => r.group.step, r => r.group.step],
    ["row", r => r.group.row_id, r => r.group.row_id],
    ["target", r => `${r.positive_rank} → ${r.positive_rank_after ?? "none"}`, r => r.failure ? -Infinity : moved(r)],
    ["reward", r => number(r.reward), r => r.reward ?? -Infinity],
    ["advantage", r => number(r.advantage), r => r.advantage ?? -Infinity],
    ["tokens", r => r.tokens, r => r.tokens],
    ["outcome", r => `${r.failure ?? outcome(r)}${r.kept ? "" : `, ${fate(r)}`}`, r => r.failure ?? outcome(r)],
    ["completion", r => r.completion, r => r.completion],
  ];

  for (const group of groups) {
    const titles = [...group.candidates, ...group.history].map(item => data.items[item][0]);
    group.text = [`step:${group.step} row:${group.row_id} user:${group.user}`, ...titles].join(" ").toLowerCase();
  }
  for (const rollout of rollouts) {
    rollout.group = groups[rollout.group];
    const words = [outcome(rollout), rollout.failure, fate(rollout), rollout.truncated ? "truncated" : ""];
    rollout.text = [...words, rollout.completion].join(" ").toLowerCase();
  }

  const search = document.getElementById("rollout-search"), choice = document.getElementById("rollout-outcome");
  const head = document.getElementById("rollout-head"), body = document.getElementById("rollout-rows");
  const count = document.getElementById("rollout-count"), more = document.getElementById("rollout-more");
  const dialog = document.getElementById("rollout-group"), content = document.getElementById("rollout-group-content");
  const titles = document.getElementById("rollout-titles");
  let sorted = "step", descending = true, found = [], open = null;

  function make(tag, text, className) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  }

  function find() {
    const words = search.value.toLowerCase().split(/\s+/).filter(word => word)
      .map(word => /^(step|row|user):\d+$/.test(word) ? `${word} ` : word);  // the whole number
    const chosen = choice.value;
    const key = COLUMNS.find(([name]) => name === sorted)[2], sign = descending ? -1 : 1;
    found = rollouts.filter(rollout =>
      (!chosen || (chosen === "discarded" ? !rollout.kept : outcome(rollout) === chosen))
      && words.every(word => rollout.text.includes(word) || rollout.group.text.includes(word)));
    found.sort((a, b) => key(a) < key(b) ? -sign : key(a) > key(b) ? sign : 0);
    body.replaceChildren();
    for (const column of head.children)
      column.ariaSort = column.dataset.name === sorted ? (descending ? "descending" : "ascending") : "none";
    showMore();
  }

  function showMore() {
    const first = body.children.length;
    for (const rollout of found.slice(first, first + PAGE)) {
      const row = make("tr");
      for (const [name, shown] of COLUMNS) row.append(make(name === "step" ? "th" : "td", shown(rollout), `c-${name}`));
      row.tabIndex = 0;
      row.addEventListener("click", () => show(rollout));
      row.addEventListener("keydown", event => { if (event.key === "Enter") show(rollout); });
      body.append(row);
    }
    count.textContent = `${found.length.toLocaleString("en")} of ${rollouts.length.toLocaleString("en")} rollouts`;
    more.hidden = body.children.length === found.length;
  }

  function withTitles(text) {
    if (!titles.checked) return text;
    return text.replace(/<s_a_\d+>(?:<s_[b-z]_\d+>)*/g, id => titleOf.has(id) ? `‹${titleOf.get(id)}›` : id);
  }

  function order(group, positions, isIncoming) {
    const list = make("ol");
    positions.forEach((position, place) => {
      const grade = group.relevance[position], before = group.first_stage_ranks[position];
      const mark = grade === null ? " (not seen)" : grade > 0 ? ` ★${grade === 1 ? "" : grade}` : "";
      const line = make("li", data.items[group.candidates[position]][0] + mark);
      if (grade > 0) line.className = "relevant";
      if (!isIncoming && before !== place + 1)
        line.append(" ", make("small", `${before > place + 1 ? "↑" : "↓"} from ${before}`, "from"));
      list.append(line);
    });
    return list;
  }

  function card(rollout, title) {
    const section = make("section", undefined, "card");
    section.append(make("h3", title));
    const target = rollout.failure ?? `target ${rollout.positive_rank} → ${rollout.positive_rank_after}`;
    const words = [target, ...(rollout.truncated ? ["truncated"] : []), fate(rollout), `${rollout.tokens} tokens`];
    section.append(make("p", words.join(", "), rollout.failure === null ? "" : "failure"));
    const facts = make("dl");
    const parts = data.rewards.map((name, place) =>
      [rollout.conditions.includes(place) ? `${name} (condition not met)` : name, rollout.reward_components[place]]);
    for (const [name, value] of [["reward", rollout.reward], ["advantage", rollout.advantage], ...parts])
      facts.append(make("dt", name), make("dd", number(value)));
    section.append(facts);
    if (rollout.order !== null) section.append(order(rollout.group, rollout.order, false));
    section.append(make("pre", withTitles(rollout.completion)));
    return section;
  }

  function render() {
    const group = open.group, ranks = group.first_stage_ranks;
    const incoming = make("section", undefined, "card");
    const positions = [...ranks.keys()].sort((a, b) => ranks[a] - ranks[b]);
    incoming.append(make("h3", "Incoming order"), order(group, positions, true));
    const prompt = make("details");
    prompt.append(make("summary", "Prompt"), make("pre", withTitles(group.prompt)));
    incoming.append(prompt);
    const cards = rollouts.filter(rollout => rollout.group === group).map((rollout, place) => {
      const section = card(rollout, `Rollout ${place + 1}`);
      if (rollout === open) section.classList.add("chosen");
      return section;
    });
    const place = `Step ${group.step}, group ${group.group}, row ${group.row_id}, user ${group.user}`;
    document.getElementById("rollout-group-title").textContent = `${place}: ${cards.length} rollouts`;
    content.replaceChildren(incoming, ...cards);
  }

  function show(rollout) {
    open = rollout;
    render();
    dialog.showModal();
    content.querySelector(".chosen").scrollIntoView({block: "nearest"});
  }

  for (const [name] of COLUMNS) {
    const column = make("th", undefined, `c-${name}`), button = make("button", name);
    column.scope = "col";
    column.dataset.name = name;
    button.addEventListener("click", () => {
      descending = sorted === name ? !descending : true;
      sorted = name;
      find();
    });
    column.append(button);
    head.append(column);
  }
  search.addEventListener("input", find);
  choice.addEventListener("change", find);
  more.addEventListener("click", showMore);
  titles.addEventListener("change", render);
  document.getElementById("rollout-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  find();
}
