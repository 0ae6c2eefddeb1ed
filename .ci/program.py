"""The program that checks an installed wheel: the same coroutine on a real local cluster and in simulation."""

import trio

import trio_ray


@trio_ray.remote
def square(x: int) -> int:
    return x * x


async def main(cluster: trio_ray.Cluster) -> list[int]:
    async with cluster.open_nursery() as nursery:
        refs = [nursery.start_soon(square, i) for i in range(100)]
    return await cluster.gather(refs)


async def real() -> None:
    async with trio_ray.open_cluster(num_cpus=2) as cluster:
        squares = await main(cluster)
    assert squares == [i * i for i in range(100)], squares
    print("a program ran on a real cluster: the squares add up to", sum(squares))


if __name__ == "__main__":
    trio.run(real)
