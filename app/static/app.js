/* The browser's half: theme, top bar, URL as state, patches in place, charts, keys. No dependencies. */
(() => {
  'use strict';
  const qa = (window.qa = window.qa || {});
  const BETWEEN = '~';
  const params = () => new URLSearchParams(location.search);

  /* ---- theme: in the URL when chosen, else remembered, else the system's --------------------- */
  const system = matchMedia('(prefers-color-scheme: dark)');
  const remembered = () => { try { return localStorage.getItem('qa-theme'); } catch { return null; } };
  function theme() {
    const wanted = params().get('theme') || remembered();
    return wanted === 'dark' || wanted === 'light' ? wanted : system.matches ? 'dark' : 'light';
  }
  function applyTheme() {
    const dark = theme() === 'dark';
    document.documentElement.dataset.theme = theme();
    if (document.body && document.body.classList.contains('dark') !== dark)
      document.body.classList.toggle('dark', dark);
    const button = document.getElementById('qa-theme');
    if (button) button.setAttribute('aria-label', dark ? 'Light theme' : 'Dark theme');
  }
  function switchTheme() {
    const next = theme() === 'dark' ? 'light' : 'dark';
    try { localStorage.setItem('qa-theme', next); } catch { /* private window: the URL carries it */ }
    setParams({ theme: next }, { silent: true, replace: true });
    applyTheme();
    charts.forEach((draw) => draw());
  }

  /* ---- the URL ------------------------------------------------------------------------------- */
  function setParams(changes, { silent = false, replace = false } = {}) {
    const now = params();
    for (const [name, value] of Object.entries(changes))
      value === '' || value === null ? now.delete(name) : now.set(name, value);
    const text = now.toString().replaceAll('%7E', '~').replaceAll('%2C', ',').replaceAll('%3A', ':');
    const url = location.pathname + (text ? '?' + text : '');
    if (url !== location.pathname + location.search)
      history[replace ? 'replaceState' : 'pushState']({}, '', url);
    carryOver();
    if (!silent) moved();
  }
  function listOf(name) { return (params().get(name) || '').split(BETWEEN).filter(Boolean); }
  function toggle(name, value, only) {
    const list = listOf(name), has = list.includes(value);
    const next = only ? (has && list.length === 1 ? [] : [value])
      : has ? list.filter((v) => v !== value) : [...list, value];
    setParams({ [name]: next.join(BETWEEN) });
  }
  /* Links to other pages keep the model and a chosen theme. */
  function carryOver() {
    document.querySelectorAll('a[data-carry]').forEach((a) => {
      const url = new URL(a.getAttribute('href'), location.href);
      for (const name of ['model', 'theme']) {
        const value = params().get(name);
        value ? url.searchParams.set(name, value) : url.searchParams.delete(name);
      }
      a.setAttribute('href', url.pathname + url.search);
    });
  }

  /* ---- the wire to the server ---------------------------------------------------------------- */
  let send = null, waiting = null;
  function moved(delay = 0) {
    clearTimeout(waiting);
    waiting = setTimeout(() => send && send('moved', {}), delay);
  }
  /* No key may be called "path": Gradio would take the action for an uploaded file. */
  function act(data) { if (send) send('act', data); }
  qa.wire = (props, watch, trigger) => {
    send = trigger;
    watch('value', () => props.value && obey(JSON.parse(props.value)));
    moved();
  };
  function obey(order) {
    document.querySelectorAll('[aria-busy]').forEach((e) => e.removeAttribute('aria-busy'));
    if (order.params) setParams(order.params, { replace: Boolean(order.replace), silent: true });
    if (order.fill) Object.entries(order.fill).forEach(([id, value]) => {
      const field = document.getElementById(id);
      if (!field) return;
      const sent = field.dataset.sent ?? field.value, since = field.value; /* what was typed since stays */
      delete field.dataset.sent;
      field.value = value + (since.startsWith(sent) ? since.slice(sent.length) : since);
    });
    if (order.toast && order.go) later(order.toast); else if (order.toast) toast(order.toast, order);
    if (order.go) location.assign(order.go);
    if (order.params) moved();
  }
  Object.assign(qa, { moved, act, params, setParams, toast });
  addEventListener('popstate', () => { applyTheme(); charts.forEach((draw) => draw()); moved(); });

  /* ---- patching HTML in place ---------------------------------------------------------------- */
  const keyOf = (node) => node.nodeType === 1 ? node.getAttribute('data-key') || node.id || '' : '';
  const alike = (a, b) => a.nodeName === b.nodeName && keyOf(a) === keyOf(b);
  function patch(old, want) {
    if (old.nodeType === 3) { if (old.data !== want.data) old.data = want.data; return; }
    if (old.nodeType !== 1) return;
    patchAttributes(old, want);
    if (old.nodeName !== 'SELECT' || old.innerHTML !== want.innerHTML) patchChildren(old, want);
    patchField(old, want);
  }
  function patchAttributes(old, want) {
    for (const { name, value } of [...want.attributes])
      if (!(old.nodeName === 'DETAILS' && name === 'open') && old.getAttribute(name) !== value)
        old.setAttribute(name, value);
    for (const { name } of [...old.attributes])
      if (!want.hasAttribute(name) && !(name === 'open' && old.nodeName === 'DETAILS')) old.removeAttribute(name);
  }
  function patchField(old, want) {
    if (old === document.activeElement && old.matches('input:not([type=checkbox]):not([type=radio]), textarea')) return;
    if (old.nodeName === 'INPUT') { old.value = want.getAttribute('value') || (old.type === 'checkbox' ? 'on' : ''); old.checked = want.hasAttribute('checked'); }
    if (old.nodeName === 'TEXTAREA') old.value = want.textContent;
    if (old.nodeName === 'SELECT') { const o = want.querySelector('option[selected]'); if (o) old.value = o.value; }
  }
  function patchChildren(old, want) {
    const keyed = new Map();
    for (const child of old.childNodes) if (keyOf(child)) keyed.set(keyOf(child), child);
    let at = old.firstChild;
    for (const wanted of [...want.childNodes]) {
      const known = keyOf(wanted) ? keyed.get(keyOf(wanted)) : null;
      if (known && known.nodeName === wanted.nodeName) {
        if (known === at) at = at.nextSibling; else old.insertBefore(known, at);
        patch(known, wanted);
      } else if (at && !keyOf(wanted) && alike(at, wanted)) {
        const next = at.nextSibling; patch(at, wanted); at = next;
      } else old.insertBefore(wanted.cloneNode(true), at);
    }
    while (at) { const next = at.nextSibling; at.remove(); at = next; }
  }
  qa.live = (element, props, watch) => {
    const root = element.querySelector('.live');
    const draw = () => {
      const want = document.createElement('div');
      want.innerHTML = props.value || '';
      patchChildren(root, want);
      carryOver();
      root.querySelectorAll('[data-follow]').forEach((e) => { e.scrollTop = e.scrollHeight; });
    };
    draw();
    watch('value', draw);
  };

  /* ---- charts -------------------------------------------------------------------------------- */
  const charts = new Set();
  const NARROW = 560;
  function themed(value, style) {
    if (typeof value === 'string' && value.startsWith('var(--')) return style.getPropertyValue(value.slice(4, -1)).trim();
    if (Array.isArray(value)) return value.map((v) => themed(v, style));
    if (value && typeof value === 'object')
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, style)]));
    return value;
  }
  const webgl = () => Boolean(document.createElement('canvas').getContext('webgl'));
  qa.chart = (element, props, watch) => {
    const box = element.querySelector('.plot');
    let ready = false, silent = false;
    /* Drawn while hidden, a chart would have Plotly's own width: it waits until it is seen. */
    const seen = new ResizeObserver(() => { if (box.clientWidth) { seen.disconnect(); draw(); } });
    const draw = () => {
      if (!props.value) return;
      if (!window.Plotly) { setTimeout(draw, 60); return; }
      if (!box.clientWidth) { seen.observe(box); return; }
      const { figure, say } = JSON.parse(props.value);
      const { data, layout } = themed(figure, getComputedStyle(document.body));
      const narrow = box.clientWidth < NARROW;
      if (narrow) {
        layout.annotations = (layout.annotations || []).filter((a) => a.name !== 'direct-label');
        layout.margin = layout.scene ? layout.margin : { ...(layout.margin || {}), l: 48, r: 12 };
        data.filter((t) => t.type === 'heatmap').forEach((t) => { t.texttemplate = ''; t.showscale = true; });
        if (layout.scene) for (const axis of ['x', 'y', 'z']) layout.scene.camera.eye[axis] *= 1.4;
      }
      if (layout.scene && !webgl()) data.forEach((t) => Object.assign(t, { type: 'heatmap', zmin: t.cmin, zmax: t.cmax }));
      if (!layout.height) layout.height = narrow ? 320 : 440;
      box.setAttribute('role', 'img');
      box.setAttribute('aria-label', say || '');
      silent = true;
      Plotly.react(box, data, layout, { responsive: true, displayModeBar: false, doubleClick: false, scrollZoom: false })
        .then(() => { silent = false; if (!ready) { ready = true; listen(box, () => silent); } box.dataset.drawn = String(Number(box.dataset.drawn || 0) + 1); });
    };
    charts.add(draw);
    draw();
    watch('value', draw);
  };
  function listen(box, silent) {
    const additive = (e) => e && (e.shiftKey || e.ctrlKey || e.metaKey);
    box.on('plotly_click', (e) => {
      const id = e.points[0] && e.points[0].customdata;
      if (typeof id === 'string' && box.closest('.selects')) toggle('runs', id, !additive(e.event));
      const names = box.layout.meta && box.layout.meta.params;  /* the URL parameters that a click sets */
      if (typeof id === 'string' && names) setParams(Object.fromEntries(names.map((n, i) => [n, id.split(BETWEEN)[i]])));
    });
    box.on('plotly_selected', (e) => {
      if (!e || !box.closest('.selects')) return;
      const ids = e.points.map((p) => p.customdata).filter((id) => typeof id === 'string');
      if (ids.length) setParams({ runs: [...new Set(ids)].join(BETWEEN) });
    });
    box.on('plotly_hover', (e) => mark(e.points[0] && e.points[0].customdata, true));
    box.on('plotly_unhover', () => mark(null));
    box.on('plotly_doubleclick', () => setParams({ zoom: '' }));
    box.on('plotly_relayout', (e) => {
      if (silent() || !box.closest('.selects')) return;
      const ranges = ['xaxis.range[0]', 'xaxis.range[1]', 'yaxis.range[0]', 'yaxis.range[1]'];
      const old = [...box.layout.xaxis.range, ...box.layout.yaxis.range];
      if (ranges.some((r) => r in e))
        setParams({ zoom: ranges.map((r, i) => Number(r in e ? e[r] : old[i]).toPrecision(5)).join(BETWEEN) });
    });
  }
  function mark(id) {
    document.querySelectorAll('tr.hot').forEach((row) => row.classList.remove('hot'));
    if (typeof id === 'string')
      document.querySelectorAll(`tr[data-run="${CSS.escape(id)}"]`).forEach((row) => row.classList.add('hot'));
  }
  function point(id) {
    const box = document.querySelector('.selects .plot');
    if (!box || !box.data || !window.Plotly) return;
    for (const [curveNumber, trace] of box.data.entries()) {
      const pointNumber = Array.isArray(trace.customdata) ? trace.customdata.indexOf(id) : -1;
      if (pointNumber >= 0) return Plotly.Fx.hover(box, [{ curveNumber, pointNumber }]);
    }
    Plotly.Fx.unhover(box);
  }
  function picture(format) {
    const box = document.querySelector('.selects .plot');
    if (!box || !box.data) return;
    const filename = 'quantarena-' + (params().get('model') || 'chart').replaceAll('/', '-');
    const style = getComputedStyle(document.body);
    const layout = { ...box.layout, paper_bgcolor: style.getPropertyValue('--surface').trim() };
    Plotly.downloadImage({ data: box.data, layout }, { format, filename, width: 1200, height: 700, scale: format === 'png' ? 2 : 1 });
  }

  /* ---- clicks and fields, one listener each --------------------------------------------------- */
  const near = (event, selector) => event.target.closest && event.target.closest(selector);
  document.addEventListener('click', (event) => {
    let on;
    if ((on = near(event, '[data-set]'))) { event.preventDefault(); setParams(JSON.parse(on.dataset.set)); }
    else if ((on = near(event, '[data-toggle]'))) {
      event.preventDefault();
      const { name, value } = JSON.parse(on.dataset.toggle);
      toggle(name, value, false);
    } else if ((on = near(event, '[data-act]'))) {
      event.preventDefault();
      if (!on.matches('[aria-disabled], [aria-busy]')) { on.setAttribute('aria-busy', 'true'); act(JSON.parse(on.dataset.act)); }
    }
    else if ((on = near(event, '[data-copy]'))) copy(on);
    else if ((on = near(event, '[data-picture]'))) picture(on.dataset.picture);
    else if ((on = near(event, '[data-theme-switch]'))) switchTheme();
    else if ((on = near(event, '[data-help]'))) help();
    else if ((on = near(event, '[data-scroll-to]'))) document.getElementById(on.dataset.scrollTo)?.scrollIntoView({ block: 'nearest' });
    else if (!near(event, 'a, button, input, select, label, summary') && (on = near(event, 'tr[data-run]')))
      toggle('runs', on.dataset.run, !(event.shiftKey || event.ctrlKey || event.metaKey));
    document.querySelectorAll('details[data-menu][open]').forEach((d) => { if (!d.contains(event.target)) d.open = false; });
  });
  document.addEventListener('mousedown', (event) => { if (event.shiftKey && near(event, 'tr[data-run]')) event.preventDefault(); });
  document.addEventListener('mouseover', (event) => { const row = near(event, 'tr[data-run]'); if (row && row !== lastRow) { lastRow = row; point(row.dataset.run); } else if (!row && lastRow) { lastRow = null; point(null); } });
  let lastRow = null;
  /* data-param: the field is a URL parameter; data-field: a knob, sent as an action. */
  function fieldChanged(field, typing) {
    if (field.dataset.param) {
      const value = field.type === 'checkbox' ? (field.checked ? field.dataset.on || '1' : '') : field.value;
      setParams({ [field.dataset.param]: value }, { silent: true, replace: typing });
      moved(typing ? 180 : 0);
    } else if (field.dataset.field) {
      const value = field.type === 'checkbox' ? String(field.checked) : field.value;
      const data = { ...JSON.parse(field.dataset.field), value };
      clearTimeout(field.wait);
      field.wait = setTimeout(() => act(data), typing ? 350 : 0);
    }
  }
  document.addEventListener('input', (event) => {
    if (event.target.matches('input[data-param]:not([type=checkbox]), textarea[data-param], input[data-field]:not([type=checkbox]), textarea[data-field]'))
      fieldChanged(event.target, true);
    if (event.target.dataset && event.target.dataset.filters) filterCards(event.target);
  });
  document.addEventListener('change', (event) => {
    if (event.target.matches('select, input[type=checkbox], input[type=radio]')) fieldChanged(event.target, false);
  });
  function filterCards(field) {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    document.querySelectorAll(field.dataset.filters).forEach((card) => {
      card.hidden = !words.every((w) => card.textContent.toLowerCase().includes(w));
    });
  }
  function copy(on) {
    const done = () => { on.classList.add('copied'); announce('Copied.'); setTimeout(() => on.classList.remove('copied'), 1500); };
    if (navigator.clipboard && isSecureContext) navigator.clipboard.writeText(on.dataset.copy).then(done, () => copyOld(on, done));
    else copyOld(on, done);
  }
  function copyOld(on, done) {
    const area = document.createElement('textarea');
    area.value = on.dataset.copy; document.body.append(area); area.select();
    document.execCommand('copy'); area.remove(); done();
  }

  /* ---- top bar, running strip, toasts: outside Gradio, so they are there at once -------------- */
  const el = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== false) node.setAttribute(key, value === true ? '' : value);
    node.append(...children);
    return node;
  };
  const SUN = '<svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d="M8 5a3 3 0 1 1 0 6a3 3 0 1 1 0-6M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M13 3l-1 1M4 12l-1 1"/></svg>';
  function frame() {
    if (document.querySelector('.top')) return;
    const here = location.pathname.replace(/\/$/, '') || '/';
    const nav = el('nav', { 'aria-label': 'Pages' });
    for (const { title, path, key } of qa.pages || [])
      nav.append(el('a', { href: path, 'data-carry': true, 'data-page': path, 'aria-current': path === here ? 'page' : null, title: key ? `g ${key}` : null }, title));
    const model = el('select', { id: 'qa-model', 'data-param': 'model', 'aria-label': 'Model' });
    const themeButton = el('button', { id: 'qa-theme', class: 'bar-button', 'data-theme-switch': true, title: 'Theme' });
    themeButton.innerHTML = SUN;
    const right = el('div', { class: 'right' }, el('label', { class: 'model' }, el('span', {}, 'Model'), model),
      el('button', { class: 'bar-button', 'data-help': true, 'aria-label': 'Keys and help', title: 'Keys and help (?)' }, '?'), themeButton);
    const bar = el('header', { class: 'top' }, el('div', { class: 'bar' },
      el('a', { href: '/', class: 'brand', 'data-carry': true }, el('span', { class: 'logo', 'aria-hidden': 'true' }), 'QuantArena'), nav, right));
    const strip = el('a', { class: 'strip', href: '/jobs', hidden: true, 'data-carry': true });
    document.body.prepend(el('a', { class: 'skip', href: '#content' }, 'Skip to content'), bar, strip);
    const current = nav.querySelector('[aria-current]');
    if (current) nav.scrollLeft = current.offsetLeft - nav.offsetLeft - nav.clientWidth / 2;
    document.body.append(el('div', { class: 'toasts', role: 'status', 'aria-live': 'polite' }), el('div', { class: 'unseen', id: 'qa-announce', 'aria-live': 'polite' }));
    applyTheme(); carryOver(); saidBefore(); status();
  }
  function announce(text) { const box = document.getElementById('qa-announce'); if (box) box.textContent = text; }
  let down = 0;
  async function status() {
    if (!document.hidden) {
      try {
        const answer = await fetch('/api/status', { cache: 'no-store' });
        if (answer.ok) { down = 0; showStatus(await answer.json()); }
      } catch { down += 1; if (down > 1) showStrip('The server does not answer; what you see is from ' + lastSeen + '.', null, true); }
    }
    setTimeout(status, 1500);
  }
  let lastSeen = '';
  function showStatus({ running, queued, text, fraction, models }) {
    lastSeen = new Date().toLocaleTimeString();
    const jobs = document.querySelector('nav a[data-page="/jobs"]');
    if (jobs) {
      let badge = jobs.querySelector('.badge');
      if (!badge) jobs.append((badge = el('span', { class: 'badge' })));
      badge.textContent = running || queued ? `${running} / ${queued}` : '';
      badge.title = running || queued ? `${running} running, ${queued} queued` : '';
    }
    const select = document.getElementById('qa-model');
    const chosen = params().get('model') || '';
    const names = [...new Set([...(chosen ? [chosen] : []), ...models])];
    if (select && select.dataset.names !== names.join() + chosen && document.activeElement !== select) {
      select.dataset.names = names.join() + chosen;
      select.replaceChildren(...names.map((n) => el('option', { value: n, selected: n === (chosen || models[0]) }, n)));
      if (!names.length) select.append(el('option', { value: '' }, 'demo'));
    }
    showStrip(text, fraction, false);
  }
  function showStrip(text, fraction, bad) {
    const strip = document.querySelector('.strip');
    if (!strip) return;
    strip.hidden = !text;
    strip.classList.toggle('bad', bad);
    if (!text) return;
    if (!strip.firstChild) strip.append(el('span', { class: 'fill' }), el('span', { class: 'words' }));
    strip.querySelector('.words').textContent = text;
    strip.querySelector('.fill').style.width = fraction === null ? '0' : (100 * fraction).toFixed(1) + '%';
  }
  function toast(text, { bad = false, undo = null, link = null } = {}) {
    const box = document.querySelector('.toasts');
    if (!box) return;
    const note = el('div', { class: 'toast' + (bad ? ' bad' : '') }, el('span', {}, text));
    if (link) note.append(el('a', { href: link.href, 'data-carry': true }, link.text));
    if (undo) note.append(el('button', { 'data-act': JSON.stringify(undo) }, 'Undo'));
    note.addEventListener('click', (e) => { if (e.target.closest('button, a')) setTimeout(() => note.remove(), 50); });
    box.append(note);
    setTimeout(() => note.remove(), undo ? 5000 : bad ? 12000 : 5000);
  }

  /* A word said on leaving a page is shown on the next one. */
  function later(text) { try { sessionStorage.setItem('qa-toast', text); } catch { /* then it is not said */ } }
  function saidBefore() {
    try { const text = sessionStorage.getItem('qa-toast'); sessionStorage.removeItem('qa-toast'); if (text) toast(text); } catch { /* nothing was kept */ }
  }

  /* ---- keys ----------------------------------------------------------------------------------- */
  /* A page's own keys: qa.keys.push({ page: '/arena', key: '1', words: 'A is better', run }). */
  qa.keys = [];
  const pageKeys = () => qa.keys.filter((k) => k.page === (location.pathname.replace(/\/$/, '') || '/'));
  function help() {
    let box = document.getElementById('qa-help');
    if (!box) {
      const rows = [...pageKeys().filter((k) => !k.again).map((k) => [k.shown || k.key, k.words]), ...(qa.pages || []).filter((p) => p.key).map((p) => [`g ${p.key}`, p.title]),
        ['/', 'Search'], ['t', 'Theme'], ['Esc', 'Clear the selection'], ['?', 'This list'],
        ['Click', 'Select a point or row'], ['Shift-click', 'Add to the selection'], ['Double-click', 'Reset the zoom']];
      box = el('dialog', { id: 'qa-help', 'aria-labelledby': 'qa-help-title' }, el('h2', { id: 'qa-help-title' }, 'Keys'),
        el('dl', {}, ...rows.flatMap(([k, what]) => [el('dt', {}, ...k.split(' ').map((part) => el('kbd', {}, part))), el('dd', {}, what)])),
        el('form', { method: 'dialog' }, el('button', { class: 'button' }, 'Close')));
      document.body.append(box);
    }
    box.showModal();
  }
  let prefix = 0;
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches && event.target.matches('input, textarea, select, [contenteditable=true]')) {
      if (event.key === 'Escape') event.target.blur();
      return;
    }
    const after = Date.now() - prefix < 1200; prefix = 0;
    const own = !after && !document.querySelector('dialog[open]') && pageKeys().find((k) => k.key === event.key);
    if (own) { event.preventDefault(); own.run(event); return; }
    const page = after && (qa.pages || []).find((p) => p.key === event.key);
    if (page) { const a = document.querySelector(`nav a[data-page="${page.path}"]`); if (a) a.click(); }
    else if (event.key === 'g') prefix = Date.now();
    else if (event.key === '?') help();
    else if (event.key === 't') switchTheme();
    else if (event.key === '/') { const box = document.querySelector('[data-search]'); if (box) { event.preventDefault(); box.focus(); box.select(); } }
    else if (event.key === 'Escape' && params().get('runs') && !document.querySelector('dialog[open]')) setParams({ runs: '' });
    else if ((event.key === 'Enter' || event.key === ' ') && event.target.matches('tr[data-run]')) { event.preventDefault(); toggle('runs', event.target.dataset.run, !event.shiftKey); }
  });

  system.addEventListener('change', () => { applyTheme(); charts.forEach((draw) => draw()); });
  applyTheme();
  const start = () => {
    frame();
    new MutationObserver(applyTheme).observe(document.body, { attributes: true, attributeFilter: ['class'] });
  };
  document.body ? start() : addEventListener('DOMContentLoaded', start);
})();
