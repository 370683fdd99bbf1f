-- Per hour, pool, class and market: the time that workers had their devices, what it was spent on,
-- and what it cost. The seconds behind billed_s add up to it.
CREATE OR REPLACE VIEW device_time_by_hour AS
SELECT date_trunc('hour', since, 'UTC') AS hour, pool, capacity_class, market,
       count(DISTINCT worker) AS workers,
       round(sum(billed_s)::numeric, 3) AS billed_s,
       round(sum(encode_s)::numeric, 3) AS encode_s,
       round(sum(denoise_s - padding_s)::numeric, 3) AS denoise_s,
       round(sum(decode_s)::numeric, 3) AS decode_s,
       round(sum(padding_s)::numeric, 3) AS padding_s,
       round(sum(turns_s - encode_s - denoise_s - decode_s)::numeric, 3) AS host_s,
       round(sum(loads_s)::numeric, 3) AS loads_s,
       round(sum(startup_s)::numeric, 3) AS startup_s,
       round(sum(idle_s)::numeric, 3) AS idle_s,
       round(sum(billed_s - turns_s - loads_s - startup_s - idle_s)::numeric, 3) AS other_s,
       round(sum(billed_s * gpu_hour_price / 3600)::numeric, 6) AS cost
FROM device_time
GROUP BY hour, pool, capacity_class, market
