/* The playground on the web page. The notebook nbs/use/playground.ipynb exports a few whole numbers
   per layer as JSON; all else is computed here, and equals kesi.paper and kesi.macs to the unit. */
'use strict';
(() => {
  const place = document.getElementById('kesi-playground');
  const source = document.getElementById('kesi-costs');
  if (!place || !source) return;
  const { datasets, networks, measured } = JSON.parse(source.textContent);
  const WAYS = { PFEC: 'pfec', restarts: 'restarts', KESI: 'kesi' };

  // Plans: what kesi.paper does

  const nearest = x => {                       // Python's round: halves go to the even neighbour
    const low = Math.floor(x);
    return x - low === .5 ? low + low % 2 : Math.round(x);
  };

  function shrink(widths, rates, multiple) {
    return widths.map((width, i) => {
      let kept = Math.trunc(width * (1 - rates[i]));
      const rounds = multiple > 1 && rates[i] !== 0;
      if (rounds) kept = Math.min(width, Math.max(multiple, nearest(kept / multiple) * multiple));
      if (kept >= 1) return kept;
      throw new RangeError(`rate ${rates[i]} would remove all ${width} filters of width ${i}; ` +
                           'a layer needs at least one');
    });
  }

  function after(network, rates, times, multiple) {
    let widths = network.full;
    for (let k = 0; k < times; k++) widths = shrink(widths, rates, multiple);
    return widths;
  }

  function stages(network) {                   // the published rates, stage by stage
    let first = 0;
    return network.stages.map(n => network.rates.slice(first, first += n));
  }

  function spelled(network, perStage, spare) { // one rate per width
    return stages(network).flatMap((published, s) => {
      const spares = spare && published.some(rate => rate > 0);
      return published.map(rate => spares && rate === 0 ? 0 : perStage[s]);
    });
  }

  // Costs: what kesi.macs counts

  function price(network, name, widths) {
    const at = Object.keys(datasets).indexOf(name), [classes, channels] = datasets[name];
    let params = network.others[at], macs = 0, peak = 0;
    widths.forEach((width, i) => { params += 2 * network.norms[i] * width; });
    for (const [reads, nIn, writes, nOut, kernel, pixelsIn, pixelsOut] of network.layers) {
      const a = reads >= 0 ? widths[reads] : nIn ?? channels;
      const b = writes >= 0 ? widths[writes] : nOut ?? classes;
      const read = network.pixels[pixelsIn][at], written = network.pixels[pixelsOut][at];
      params += kernel * a * b;
      macs += kernel * a * b * written;
      peak = Math.max(peak, a * read + b * written);
    }
    return { params, macs, weights: 4 * params, activations: 4 * peak };
  }

  // Small helpers for the page

  function make(tag, attributes = {}, ...children) {
    const drawn = /^(svg|rect|circle|line|text|title|polyline|g)$/.test(tag);
    const e = drawn ? document.createElementNS('http://www.w3.org/2000/svg', tag)
                    : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
    e.append(...children);
    return e;
  }

  const thousands = n => n.toLocaleString('en-US');
  const COLUMNS = {
    params: ['parameters', thousands],
    macs: ['MACs', thousands],
    weights: ['weights', n => `${(n / 2 ** 20).toFixed(2)} MiB`],
    activations: ['peak activations', n => `${Math.round(n / 2 ** 10)} KiB`],
  };

  function table(rows, full) {
    const head = make('tr', {}, make('th'));
    for (const [title] of Object.values(COLUMNS)) head.append(make('th', {}, title));
    const body = make('tbody');
    for (const [name, costs] of rows) {
      const row = make('tr', {}, make('td', {}, name));
      for (const [key, [, text]] of Object.entries(COLUMNS)) {
        const value = costs ? costs[key] : '';
        const cell = make('td', { 'data-value': value }, costs ? text(value) : '—');
        const percent = Math.round(100 - 100 * value / full[key]);
        if (costs && value !== full[key]) cell.append(make('small', {}, ` −${percent} %`));
        row.append(cell);
      }
      body.append(row);
    }
    return make('div', { class: 'table-wrapper' },
                make('table', { class: 'docutils' }, make('thead', {}, head), body));
  }

  function picture(height, label, ...parts) {
    const attributes = { viewBox: `0 0 720 ${height}`, role: 'img', 'aria-label': label };
    return make('svg', attributes, ...parts);
  }

  function rect(kind, x, y, width, height, title) {
    return make('rect', { class: kind, x, y, width, height }, make('title', {}, title));
  }

  function write(x, y, text, attributes = {}) {
    return make('text', { x, y, ...attributes }, text);
  }

  function bars(network, mine, theirs) {
    const each = 704 / network.full.length, tall = 128 / Math.max(...network.full);
    const drawn = picture(172, 'widths of the layers'), inner = each - Math.min(2, each / 4);
    let first = 0;
    network.stages.forEach((n, s) => {
      drawn.append(write(10 + each * first, 164, `stage ${s + 1}`));
      first += n;
    });
    network.full.forEach((full, i) => {
      const x = 8 + i * each, bar = (kind, filters, whose) =>
        rect(kind, x, 144 - filters * tall, inner, filters * tall, `${filters} filters, ${whose}`);
      drawn.append(bar('unpruned', full, 'unpruned'), bar('mine', mine[i], 'your plan'));
      if (each > 24) drawn.append(write(x + inner / 2, 139, mine[i], { class: 'inside' }));
      if (!theirs) return;
      const title = `${theirs[i]} filters, the paper's plan`;
      drawn.append(rect('theirs', x, 143 - theirs[i] * tall, each, 2, title));
    });
    return drawn;
  }

  // Accuracies that were measured for the published plan

  function published(network, name, found) {   // [way, prunings, share of the MACs, accuracy]
    const full = price(network, name, network.full).macs;
    const points = [['unpruned', 0, 1, found.unpruned]];
    for (const [way, list] of Object.entries(found.ways)) {
      for (const [times, accuracy] of list) {
        const widths = after(network, network.rates, times, 1);
        points.push([way, times, price(network, name, widths).macs / full, accuracy]);
      }
    }
    return points;
  }

  function curve(points, share, times) {
    const all = points.map(p => p[3]);
    const low = Math.floor(Math.min(...all)), high = Math.ceil(Math.max(...all));
    const x = macs => 40 + 660 * macs, y = percent => 10 + 150 * (high - percent) / (high - low);
    const line = (kind, x1, x2, y1, y2) => make('line', { class: kind, x1, x2, y1, y2 });
    const middle = { 'text-anchor': 'middle' }, drawn = picture(196, 'measured accuracies');
    for (const level of [low, high]) {
      drawn.append(line('grid', 40, 700, y(level), y(level)),
                   write(34, y(level) + 4, level, { 'text-anchor': 'end' }));
    }
    for (const part of [0, .25, .5, .75, 1]) {
      drawn.append(write(x(part), 178, `${100 * part} %`, middle));
    }
    drawn.append(write(370, 194, 'MACs that are left', middle),
                 line('here', x(share), x(share), 6, 164));
    for (const [way, k, macs, accuracy] of points) {
      const chosen = k > 0 && k === times;
      const kind = `${WAYS[way] || 'whole'}${chosen ? ' chosen' : ''}`;
      const title = `${way}${k ? `, ${k} prunings` : ''}: ${accuracy.toFixed(2)} %`;
      const at = { class: kind, cx: x(macs), cy: y(accuracy), r: chosen ? 6 : 3.5 };
      drawn.append(make('circle', at, make('title', {}, title)));
    }
    return drawn;
  }

  function legend() {
    const ways = Object.entries({ ...WAYS, unpruned: 'whole' });
    return make('p', { class: 'legend' },
                ...ways.map(([way, kind]) => make('span', { class: kind }, `● ${way}`)));
  }

  function accuracies(state, network, mine) {
    const found = measured[state.data], box = make('div', { class: 'measured' });
    if (!found || found.network !== state.arch) {
      box.append(make('p', {}, `No study of ours has measured ${state.arch} on ${state.data}.`));
      return box;
    }
    const points = published(network, state.data, found);
    const same = sameWidths(mine, network, state.times);
    const here = same ? points.filter(p => p[1] === state.times) : [];
    const [now, full] = [mine, network.full].map(w => price(network, state.data, w).macs);
    const percent = accuracy => `${accuracy.toFixed(2)} %`;
    const told = here.map(([way, , , accuracy]) => `${way} ${percent(accuracy)}`).join(', ');
    const whole = `unpruned ${percent(found.unpruned)}`;
    const text = told ? `Measured at exactly this plan: ${told}; ${whole}. `
                      : 'Measured was the published plan only; the line marks the MACs of yours. ';
    box.append(make('p', {}, text, `Test accuracy, mean of ${found.seeds} seeds: `,
                    make('a', { href: `../reproduce/${found.study}.html` }, 'the study'), '.'),
               curve(points, now / full, here.length ? state.times : -1), legend());
    return box;
  }

  function sameWidths(mine, network, times) {
    try { return after(network, network.rates, times, 1).join() === mine.join(); }
    catch { return false; }
  }

  // The command

  function command(state, network, rates) {
    const words = ['kesi_run', `${state.data}/${state.arch}`];
    const perStage = spelled(network, state.rates, false).join() === rates.join();
    const shortest = perStage ? state.rates : rates, ours = rates.join() !== network.rates.join();
    if (ours) words.push(`--set rates=${shortest.join()}`);
    if (state.times !== 5) words.push(`--set iterations=${state.times}`);
    if (state.multiple !== 1) words.push(`--set multiple=${state.multiple}`);
    return words.join(' ');
  }

  function copy(text, button) {
    const done = () => { button.textContent = 'Copied'; };
    const byHand = () => {
      getSelection().selectAllChildren(place.querySelector('code'));
      document.execCommand('copy');
      done();
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, byHand);
    else byHand();
  }

  // The controls

  const controls = make('div', { class: 'controls' });
  const sliders = make('div', { class: 'controls rates' });
  const shown = make('div', { class: 'shown', 'aria-live': 'polite' });

  function row(title, input, show = value => value) {
    const value = make('output'), label = make('label', {}, make('span', {}, title), input, value);
    const update = () => { value.textContent = input.type === 'range' ? show(input.value) : ''; };
    input.addEventListener('input', update);
    input.addEventListener('input', draw);
    input.update = update;
    update();
    return label;
  }

  function select(name, values) {
    const e = make('select', { name });
    for (const v of values) e.append(make('option', {}, v));
    return e;
  }

  const range = (name, max, step) => make('input', { type: 'range', name, min: 0, max, step });
  const arch = select('network', Object.keys(networks));
  const data = select('dataset', Object.keys(datasets));
  const times = range('iterations', 10, 1);
  const multiple = select('multiple', [1, 2, 4, 8, 16]);
  const spare = make('input', { type: 'checkbox', name: 'spare' });
  const reset = make('button', { type: 'button', name: 'reset' }, "The paper's plan");
  [times.min, times.value, spare.checked] = [1, 5, true];

  function restart() {                         // sliders for the stages, at the paper's rates
    sliders.replaceChildren(...stages(networks[arch.value]).map((published, s) => {
      const input = range(`rate${s + 1}`, .9, .05);
      input.value = Math.max(...published);
      return row(`rate of stage ${s + 1}`, input, value => Number(value).toFixed(2));
    }));
  }

  function said() {
    const inputs = [...sliders.querySelectorAll('input')];
    const rates = inputs.map(e => Number(Number(e.value).toFixed(2)));
    return { arch: arch.value, data: data.value, rates, times: Number(times.value),
             multiple: Number(multiple.value), spare: spare.checked };
  }

  function draw() {
    const state = said(), network = networks[state.arch];
    const rates = spelled(network, state.rates, state.spare);
    let mine, theirs = null;
    try { theirs = after(network, network.rates, state.times, 1); }
    catch { /* the published plan would leave nothing */ }
    try { mine = after(network, rates, state.times, state.multiple); }
    catch (e) {
      shown.replaceChildren(make('p', { class: 'refused' }, e.message));
      place.dataset.widths = '';
      return;
    }
    const priced = widths => widths && price(network, state.data, widths);
    const rows = [['unpruned', priced(network.full)], ["the paper's plan", priced(theirs)],
                  ['your plan', priced(mine)]];
    const text = command(state, network, rates);
    const button = make('button', { type: 'button', name: 'copy' }, 'Copy');
    button.addEventListener('click', () => copy(text, button));
    shown.replaceChildren(table(rows, rows[0][1]), bars(network, mine, theirs),
                          make('p', { class: 'command' }, make('code', {}, text), button),
                          accuracies(state, network, mine));
    place.dataset.widths = JSON.stringify(mine);
  }

  arch.value = 'resnet20';
  arch.addEventListener('input', restart);
  reset.addEventListener('click', () => {
    [times.value, multiple.value, spare.checked] = [5, 1, true];
    times.update();
    restart();
    draw();
  });
  controls.append(row('network', arch), row('dataset', data), row('prunings', times),
                  row('round widths to', multiple),
                  row('spare the same blocks as the paper', spare), reset);
  place.replaceChildren(controls, sliders, shown);
  restart();
  draw();
})();
